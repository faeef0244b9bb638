"""Trainings that lose all ranks at once, and are started again by the shepherds that are left."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from training import Training, family, kill_all, launched, running, wait_for, warm

from hpcft.ckpt import near
from hpcft.world.progress import shepherd_of

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi


def checkpointed(path: Path) -> list[str]:
    return ["--ckpt-dir", str(path / "checkpoints"), "--ckpt-every", "5"]


def saved(run: Training) -> int:
    """The step of the newest checkpoint."""
    return max((e["step"] for e in run.events() if e["kind"] == "checkpoint"), default=-1)


def test_without_shepherds_the_launcher_starts_all_again(launch: Launch, tmp_path: Path) -> None:
    options = [*checkpointed(tmp_path), "--max-relaunch", "2"]
    run = launch("--nproc", "2", *options, program=["--steps", "100000"])
    wait_for("a checkpoint", lambda: saved(run) >= 5)
    os.kill(run.mpiexec(), signal.SIGKILL)
    launched(run, 2)
    before = saved(run)
    wait_for("another", lambda: saved(run) > before)
    # The budget is one, whoever relaunches.
    kill_all(run)
    launched(run, 3)
    run.wait_for_step(run.step() + 5)
    os.kill(run.mpiexec(), signal.SIGKILL)
    summary = run.finish(code=137)
    assert not family(run.run_dir)
    reasons = [relaunch["reason"] for relaunch in summary["relaunches"]]
    assert reasons[0] == "mpiexec ended with exit code 137, and with it all shepherds"
    assert reasons[1] == "all ranks failed, the last: killed by SIGKILL"
    restored = [event["step"] for event in run.events() if event["kind"] == "restore"]
    assert 5 <= restored[0] < restored[1]
    # Logs of the launches before are kept.
    assert re.search("^step 1 ", run.logs(), re.M)


def test_everything_lost_is_started_again(launch: Launch, tmp_path: Path, undisturbed: str) -> None:
    go = tmp_path / "go"
    program = ["--pace", "0.1", "--until", str(go)]
    run = launch("--nproc", "3", "--spares", "1", *checkpointed(tmp_path), program=program)
    run.wait_for_step(11)
    shepherds = {shepherd_of(entry["pid"]) for entry in run.ranks()}
    kill_all(run)
    launched(run, 2)
    # The same shepherds; and a spare is a spare again.
    assert {shepherd_of(entry["pid"]) for entry in run.ranks()} == shepherds
    assert [entry["role"] for entry in run.ranks()] == ["active"] * 3 + ["spare"]
    # What is started again heals in place as before.
    run.send(1)
    wait_for("the recovery", lambda: any(e["kind"] == "recovered" for e in run.events()))
    # Its mpiexec is lost, and the warm process as well: for once it can do without.
    ranks = {entry["pid"] for entry in run.ranks()}
    for process in [*running(run, "ticket.py"), *warm(run)]:
        process.kill()
    run.wait_for_step(run.step() + 10)
    assert {entry["pid"] for entry in run.ranks()} == ranks
    kill_all(run)
    launched(run, 3)
    go.touch()
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert len(summary["relaunches"]) == 2
    assert all(relaunch["step"] >= 11 for relaunch in summary["relaunches"])
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 1}
    assert "hpcft: relaunching 4 ranks, 1 of 3: all ranks failed" in run.output
    wait_for("all to end", lambda: not family(run.run_dir))


def test_too_few_ranks_are_as_many_again_and_so_often_as_is_allowed(
    launch: Launch, tmp_path: Path
) -> None:
    program = ["--steps", "100000", "--pace", "0.05"]
    options = ["--min-ranks", "2", "--max-relaunch", "1", *checkpointed(tmp_path)]
    run = launch("--nproc", "2", *options, program=program)
    run.wait_for_step(6)
    run.send(1)
    launched(run, 2)
    assert [entry["role"] for entry in run.ranks()] == ["active"] * 2
    kill_all(run)
    run.wait(137)
    assert "relaunched once within an hour (--max-relaunch)" in run.output
    assert run.output.count("hpcft: the run has failed") == 1


def test_an_exception_that_comes_again_is_not_tried_for_ever(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    text = (Path(__file__).parents[1] / "programs" / "train.py").read_text()
    wrong = 'if state.step == 8: raise ValueError("a bad batch")'
    script.write_text(text.replace("    harm()\n", f"    {wrong}\n", 1))
    options = ["--nproc", "2", *checkpointed(tmp_path)]
    run = Training(tmp_path / "run", options, [str(script), "--steps", "20"]).start()
    summary = run.finish(code=1)
    assert [relaunch["step"] for relaunch in summary["relaunches"]] == [8]
    assert summary["reason"].endswith(
        "ValueError: a bad batch; no launch comes further than step 8"
    )


@pytest.mark.parametrize("when", ["mustering", "starting"])
def test_a_relaunch_that_is_interrupted_leaves_nothing(
    launch: Launch, tmp_path: Path, when: str
) -> None:
    options = [*checkpointed(tmp_path), "--ckpt-near", "2"]
    program = ["--steps", "100000", "--pace", "0.05"]
    run = launch("--nproc", "2", *options, program=program)
    run.wait_for_step(6)
    kill_all(run)
    if when == "starting":
        wait_for("the relaunch", lambda: "hpcft: relaunching" in run.output)
    run.process.send_signal(signal.SIGINT)
    code = run.process.wait(60)
    wait_for("all to end", lambda: not family(run.run_dir))
    # In order, if it was there again already; too late, if it was not known yet that all are lost:
    # then what is in memory is all there is.
    assert code in (130, 75, 137)
    memory = Path(near.place(near.MEMORY, str(tmp_path / "checkpoints")))
    assert memory.exists() == (code == 137)
    shutil.rmtree(memory, ignore_errors=True)
