"""Trainings that find out themselves how often to save."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training import Training, kill_all, launched, wait_for

from hpcft.ckpt.history import Habit, History

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi


def intervals(run: Training) -> list[dict[str, Any]]:
    return [event["detail"] for event in run.events() if event["kind"] == "interval"]


def test_saves_that_hold_training_up_become_rarer(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    # 27 MB through a pool of 16 MB, at 5 MB/s: training waits for a second.
    slow = ["--ckpt-memory", "16M", "--ckpt-bandwidth", "5M"]
    run = launch(
        *("--nproc", "1", "--ckpt-dir", str(folder), "--ckpt-every", "auto:5s", *slow),
        program=["--width", "100000", "--steps", "1000000"],
    )
    wait_for("a longer interval", lambda: intervals(run), 120)
    found = intervals(run)[0]
    assert found["before_s"] == 5
    # That of a disk, and not of the machine this runs on, is the least it can be.
    assert found["cost_s"] > 0.5
    assert found["every_s"] >= 10 * found["cost_s"] * 0.999
    assert "no more than 10 %" in found["bound"]
    assert "hpcft: from here on a checkpoint every" in run.output


def test_failures_that_need_a_checkpoint_have_more_of_them_saved(
    launch: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    # As a run before has found out, which has ended well.
    History(3600, {}, {"files": Habit(0.1, 0.1, 3600)}).write(folder)
    run = launch(
        *("--nproc", "2", "--spares", "1", "--ckpt-dir", str(folder), "--ckpt-every", "auto"),
        program=["--steps", "1000000", "--save-at=7"],
    )
    run.wait_for_step(15)
    # A spare takes over, and no step is lost.
    run.send(1)
    wait_for("the recovery", lambda: any(e["kind"] == "resume" for e in run.events()))
    assert not intervals(run)
    for times in (1, 2):
        kill_all(run)
        launched(run, times + 1)
        wait_for(f"interval {times}", lambda times=times: len(intervals(run)) == times)
    first, second = intervals(run)
    assert [found["failures"] for found in (first, second)] == [1, 2]
    assert second["every_s"] < first["every_s"] < first["before_s"] == 3600
    run.process.terminate()
    run.wait(75)
    history = History.read(folder)
    assert (history.restores, history.running) == ({"files": 2}, False)
    assert history.node_seconds > 3600
