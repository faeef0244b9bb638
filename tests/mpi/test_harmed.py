"""Trainings that `hpcft chaos` harms, and judges."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from training import Training, wait_for

from hpcft.chaos import notes
from hpcft.ckpt.store import Store
from hpcft.cli.main import main

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi


def chaos(run: Training, schedule: str, *options: str) -> subprocess.Popen[str]:
    file = run.run_dir.with_suffix(".faults")
    file.write_text(schedule)
    command = [sys.executable, "-m", "hpcft.cli.main", "chaos", str(run.run_dir)]
    return subprocess.Popen(
        [*command, "--schedule", str(file), "--settle", "120s", *options],
        stdout=subprocess.PIPE,
        text=True,
    )


def verdict(process: subprocess.Popen[str], code: int) -> dict[str, Any]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    found: dict[str, Any] = json.loads(out)
    return found


def begun(run: Training, folder: Path, checkpoints: int) -> None:
    """Wait for so many checkpoints, and for what says that it trains."""
    run.wait_for_step(3)
    wait_for(
        f"{checkpoints} checkpoints",
        lambda: folder.exists() and len(Store(folder).committed()) >= checkpoints,
    )
    wait_for("status.json", lambda: (run.run_dir / "status.json").exists())


def test_what_can_be_borne_is_passed_and_told(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run = launch(
        *("--nproc", "2", "--spares", "3", "--ckpt-dir", str(folder), "--ckpt-every", "1000000"),
        program=["--steps", "1000000", "--save-at=4", "--save-at=6"],
    )
    begun(run, folder, 2)
    schedule = """
        0s kill rank=1
        1s slow rank=0 for=2s
        1s corrupt for=2s
        1s memory rank=0 for=1s percent=1
        2s cut                             # of a run on one host: refused
        6s hang for=3s
        12s kill spare
        """
    found = verdict(chaos(run, schedule, "--expect", "recover", "--seed", "7", "--json"), 0)
    answers = [one["answer"] for one in found["findings"]]
    # A slow rank may take too long for the shepherd of a busy machine; then it is replaced.
    assert answers[0] == "substitute"
    assert answers[1] in ("went on", "substitute")
    assert answers[2:] == ["went on", "went on", "refused", "substitute", "spare lost"]
    assert found["findings"][0]["recovery_s"] > 0
    assert found["passed"]
    assert [one["ok"] for one in found["checkpoints"]] == [True, True]
    assert list(notes.left(run.run_dir)) == []
    told = [event["detail"] for event in run.events() if event["kind"] == "chaos"]
    assert [one["fault"] for one in told if "over" not in one] == [
        *("kill", "slow", "corrupt", "memory", "hang", "kill")
    ]
    assert main(["report", str(run.run_dir)]) == 0
    assert "hpcft chaos at step" in (run.run_dir / "report.html").read_text()


@pytest.mark.skipif(
    not os.access("/sys/fs/cgroup/blkio/blkio.throttle.write_bps_device", os.W_OK),
    reason="needs root and control groups of version 1 with blkio",
)
def test_a_slow_disk_is_slow_for_a_time(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run = launch(
        *("--nproc", "1", "--ckpt-dir", str(folder), "--ckpt-every", "5"),
        program=["--steps", "1000000", "--width", "50000"],
    )
    begun(run, folder, 2)
    pid = run.entry(0)["pid"]
    groups = Path(f"/proc/{pid}/cgroup").read_text()
    process = chaos(run, "0s slow-disk rank=0 for=30s mbps=2", "--json")
    wait_for("the fault", lambda: any(event["kind"] == "chaos" for event in run.events()))
    assert "blkio:/hpcft-chaos-" in Path(f"/proc/{pid}/cgroup").read_text()
    at = run.step()
    run.wait_for_step(at + 1)
    wait_for(
        "a save",
        lambda: any(e["kind"] == "checkpoint" and e["step"] > at + 5 for e in run.events()),
    )
    found = verdict(process, 0)
    # There is no room for the next while one is being written.
    assert [one["answer"] for one in found["findings"]] == ["said"]
    # 12 MB, of which no more than two come through in a second.
    saves = [e["detail"]["seconds"] for e in run.events() if e["kind"] == "checkpoint"]
    assert max(saves) > 4
    assert Path(f"/proc/{pid}/cgroup").read_text() == groups
    assert not list(Path("/sys/fs/cgroup/blkio").glob("hpcft-chaos-*"))


def test_what_cannot_be_borne_fails(launch: Launch) -> None:
    run = launch("--nproc", "2", "--min-ranks", "2", program=["--steps", "1000000"])
    run.wait_for_step(3)
    wait_for("status.json", lambda: (run.run_dir / "status.json").exists())
    found = verdict(chaos(run, "0s kill rank=1\n60s kill", "--json"), 1)
    assert not found["passed"]
    assert found["state"] == "failed"
    assert [one["answer"] for one in found["findings"]] == ["open", "refused"]
    run.wait(3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_what_is_broken_off(
    launch: Launch, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "checkpoints"
    run = launch(
        *("--nproc", "1", "--ckpt-dir", str(folder), "--ckpt-every", "1000000"),
        program=["--steps", "1000000", "--save-at=4", "--save-at=6"],
    )
    begun(run, folder, 2)
    process = chaos(run, "0s corrupt for=1h\n0s slow rank=0 for=1h")
    wait_for("both faults", lambda: sum(e["kind"] == "chaos" for e in run.events()) == 2)
    assert main(["ckpt", "verify", str(folder)]) == 1
    hands = psutil.Process(process.pid).children()
    assert len(hands) == 2
    if number == signal.SIGKILL:
        # One hand is killed as well, and cannot undo what it has done.
        hands[0].kill()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    psutil.wait_procs(hands, 60)
    left = [note.kind for _, note in notes.left(run.run_dir)]
    assert left == ([] if number == signal.SIGINT else ["corrupt"])
    if left:
        assert main(["ckpt", "verify", str(folder)]) == 1
        assert main(["chaos", str(run.run_dir), "--rate", "60/m", "--for", "1m"]) == 2
        assert main(["chaos", "--undo", str(run.run_dir)]) == 0
    assert list(notes.left(run.run_dir)) == []
    assert main(["ckpt", "verify", str(folder)]) == 0
    step = run.step()
    run.wait_for_step(step + 2)
