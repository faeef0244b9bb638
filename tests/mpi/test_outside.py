"""Looking at a training from outside, and ending it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Training, wait_for

from hpcft.cli.main import main

pytestmark = pytest.mark.mpi

Launch = Callable[..., Training]
HPCFT = [sys.executable, "-m", "hpcft.cli.main"]


def test_a_training_is_seen_from_outside_and_ended(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ["--ckpt-dir", str(tmp_path / "checkpoints"), "--ckpt-every", "20"]
    run = launch("--nproc", "2", "--spares", "1", *saving, program=["--steps", "100000"])
    name = str(run.run_dir)

    def json_of(*words: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    def top(**wanted: object) -> dict[str, Any] | None:
        (view,) = json_of("top", name)
        return view if all(view[key] == value for key, value in wanted.items()) else None

    # By its name, from the moment it is started.
    view = wait_for("the run", lambda: json_of("ps"))[0]
    assert (view["name"], view["run_dir"]) == (run.run_dir.name, name)
    run.wait_for_step(30)
    view = wait_for("the rate", lambda: (v := top(state="training")) and v["rate"] and v)
    assert view["command"][2:4] == ["--nproc", "2"]
    assert (view["active"], view["spares"], view["failures"]) == (2, 1, [])
    assert view["step"] >= 30
    assert view["metrics"]["loss"] > 0
    wait_for("a checkpoint", lambda: (top() or {})["checkpoint"])
    (one,) = json_of("ps", run.run_dir.name)
    assert one["checkpoint"]["step"] % 20 == 0
    assert one["checkpoint"]["bytes"] > 0
    assert one["checkpoints"] == str(tmp_path / "checkpoints")

    # Each rank of this host tells how far it is, by itself.
    pids = {entry["pid"] for entry in run.ranks()}
    assert {rank["pid"] for rank in one["ranks"]} == pids
    assert {rank["state"] for rank in one["ranks"][:2]} <= {"computing", "waiting"}
    assert all(rank["step"] >= 30 for rank in one["ranks"][:2])
    assert (one["ranks"][2]["role"], one["ranks"][2]["state"]) == ("spare", "parked")

    # A terminal, until the key q; there is no room for all columns.
    process, terminal = pty.fork()
    if process == 0:
        os.environ["COLUMNS"] = "40"
        os.execv(sys.executable, [*HPCFT, "top", name, "--every", "0.1"])
    seen = b""
    while seen.count(b"parked") < 3:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"q")
    while True:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # closed
            break
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    os.close(terminal)
    assert b"rank" in seen
    assert b"pid" not in seen

    # Who fails is told, and so is who plays its part from then on.
    following = subprocess.Popen(
        [*HPCFT, "logs", name, "-f", "--rank", "1"], stdout=subprocess.PIPE, text=True
    )
    victim = run.entry(1)
    run.send(1)
    view = wait_for("the recovery", lambda: (v := top()) and v["failures"] and v)
    assert view["failures"][0]["ranks"] == [1]
    cause = view["failures"][0]["cause"]
    assert (view["active"], view["spares"]) == (2, 0)
    lost = next(rank for rank in view["ranks"] if rank["role"] == "lost")
    assert (lost["logical"], lost["world"]) == (1, victim["world"])
    capsys.readouterr()
    assert main(["top", name]) == 0
    shown = capsys.readouterr().out
    assert cause in shown
    assert "substitute" in shown
    failed = json_of("logs", name, "--failed", "-n", "2")
    assert {line["world"] for line in failed} == {victim["world"]}
    assert [line["line"].split()[:1] for line in failed] == [["step"], ["step"]]
    before = (run.run_dir / "logs" / "rank-2.log").stat().st_size
    wait_for(
        "more steps", lambda: (run.run_dir / "logs" / "rank-2.log").stat().st_size > before + 100
    )

    # Ended, it is there for who asks for it.
    (view,) = json_of("stop", name)
    assert view["ended"]
    assert run.process.wait(60)
    assert json_of("ps") == []
    (view,) = json_of("ps", "--all")
    assert (view["state"], view["name"]) == (run.summary()["result"], run.run_dir.name)
    output, _ = following.communicate(timeout=30)
    assert {"rank 1 (was spare 2) "} <= {line.split("|")[0] for line in output.splitlines()}
    assert main(["stop", name]) == 0
    assert "had ended before" in capsys.readouterr().out


def test_a_launcher_that_was_killed_is_found_out_and_a_new_run_is_ended_at_once(
    launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch("--nproc", "1", program=["--steps", "100000"])
    run.wait_for_step(1)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert main(["ps", str(run.run_dir), "--json"]) == 0
    view = json.loads(capsys.readouterr().out)
    assert (view["state"], view["ended"]) == ("killed", True)
    assert main(["stop", str(run.run_dir)]) == 0
    # In the same directory, and so in the place of the other.
    run.start()
    capsys.readouterr()

    def starting() -> bool:
        main(["ps", "--json"])
        return bool(capsys.readouterr().out)

    wait_for("the new run", starting)
    assert main(["stop", str(run.run_dir), "--now"]) == 0
    assert run.process.wait(60) != 0
    assert "has ended" in capsys.readouterr().out
