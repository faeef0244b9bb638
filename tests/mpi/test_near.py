"""Checkpoints in memory on one machine, where they outlive ranks, and the run if it fails."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training import HERE, Training, family, wait_for

Launch = Callable[..., Training]
SCRIPT = str(HERE / "programs" / "train.py")

pytestmark = pytest.mark.mpi


@pytest.fixture
def near(tmp_path: Path) -> Path:
    """Where the memory of the machine would be."""
    made = tmp_path / "near"
    made.mkdir()
    return made


@pytest.fixture
def train(tmp_path: Path, near: Path) -> Iterator[Launch]:
    started: list[Training] = []

    def start(*program: str, spares: int = 0) -> Training:
        options = ["--nproc", "3", "--spares", str(spares), "--ckpt-dir", str(tmp_path / "far")]
        options += ["--ckpt-every", "1000", "--ckpt-near", f"5:{near}"]
        run = Training(tmp_path / f"run{len(started)}", options, [SCRIPT, *program])
        started.append(run.start())
        return run

    yield start
    for run in started:
        run.stop()


def wait_for_one(near: Path) -> None:
    """Wait until a second checkpoint has been begun, so that one is complete."""
    wait_for("checkpoints", lambda: len(list(near.glob("hpcft-near-*/*-*/state.h5"))) > 1)


def kill(run: Training) -> None:
    """The launcher is killed, and all others end with it."""
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)


def test_when_all_copies_are_lost_they_come_from_memory(
    train: Launch, near: Path, undisturbed: str
) -> None:
    run = train(*(f"--suicide=27:{rank}" for rank in range(3)), spares=3)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    # Which one depends on how fast the disk is.
    assert 1 <= summary["restored_step"] <= 25
    assert "on the nodes" in run.output
    assert not list(near.iterdir())


def test_a_run_that_was_killed_goes_on_from_memory(train: Launch, near: Path) -> None:
    run = train("--pace", "0.1", "--steps", "1000")
    wait_for_one(near)
    kill(run)
    again = train("--steps", "40")
    assert again.finish()["restored_step"] >= 1
    assert not list(near.iterdir())


def test_an_interrupted_run_leaves_nothing(train: Launch, near: Path) -> None:
    run = train("--pace", "0.1", "--steps", "1000")
    wait_for_one(near)
    run.process.terminate()
    run.process.wait(30)
    assert not list(near.iterdir())


def test_who_removes_the_checkpoints_starts_from_the_beginning(
    train: Launch, near: Path, tmp_path: Path
) -> None:
    run = train("--pace", "0.1", "--steps", "1000")
    wait_for_one(near)
    kill(run)
    for file in (tmp_path / "far").iterdir():
        file.unlink()
    assert train("--steps", "10").finish()["restored_step"] is None


def test_when_nothing_near_is_good_and_nothing_committed_it_starts_from_the_beginning(
    train: Launch, near: Path
) -> None:
    run = train("--pace", "0.1", "--steps", "1000")
    wait_for_one(near)
    kill(run)
    for file in near.glob("hpcft-near-*/*-*/state.h5"):
        with file.open("r+b") as raw:
            raw.write(b"damaged")
    again = train("--steps", "10")
    assert again.finish()["restored_step"] is None
    assert "no node has a good state.h5" in again.output
