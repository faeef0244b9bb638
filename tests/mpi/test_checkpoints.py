"""Trainings that are killed altogether, started again, and end as if they had not been."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from training import Training, family, wait_for

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.restore import load
from hpcft.ckpt.store import Store

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def options(folder: Path, every: object = 1, nproc: int = 3, spares: int = 0) -> list[str]:
    checkpoints = ["--ckpt-dir", str(folder), "--ckpt-every", str(every)]
    return ["--nproc", str(nproc), "--spares", str(spares), *checkpoints]


def kill_all(run: Training) -> None:
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Store(folder).committed()]


def contents(folder: Path) -> dict[int, dict[str, Any]]:
    engine = Engine(16 << 20)
    return dict(load(checkpoint.state, engine) for checkpoint in Store(folder).committed())


@pytest.mark.parametrize("more", [[], ["--no-ckpt-overlap"]])
def test_killed_altogether_and_started_again(
    launch: Launch, undisturbed: str, folder: Path, more: list[str]
) -> None:
    run = launch(*options(folder, every=5), *more)
    wait_for("two checkpoints", lambda: folder.exists() and len(steps(folder)) >= 2)
    kill_all(run)
    # Each of them is whole, and holds what it says.
    for step, content in contents(folder).items():
        assert content["values"]["seen"] == step * 16
        assert content["optimizer"]["state"][0]["step"].item() == step
    newest = steps(folder)[-1]
    summary = launch(*options(folder, every=5), *more).finish()
    assert summary["restored_step"] == newest
    assert summary["params_sha256"] == undisturbed
    assert summary["steps"] == 60
    # The newest three, and nothing lies about.
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "step-000000000050",
        "step-000000000055",
        "step-000000000060",
    ]


def test_killed_again_and_again(launch: Launch, undisturbed: str, folder: Path) -> None:
    for more in range(3):
        before = steps(folder)[-1] if folder.exists() else 0
        run = launch(*options(folder))
        enough = before + 4 + more
        wait_for(
            "some checkpoints",
            lambda enough=enough: folder.exists() and steps(folder) and steps(folder)[-1] >= enough,
        )
        kill_all(run)
    assert launch(*options(folder)).finish()["params_sha256"] == undisturbed


def test_a_finished_run_is_restored_on_another_number_of_ranks(
    launch: Launch, undisturbed: str, folder: Path
) -> None:
    assert launch(*options(folder)).finish()["checkpoints"][-1] == 60
    for nproc in (1, 4):
        summary = launch(*options(folder, nproc=nproc)).finish()
        assert (summary["restored_step"], summary["params_sha256"]) == (60, undisturbed)


def test_ranks_that_die_while_saving(launch: Launch, undisturbed: str, folder: Path) -> None:
    suicides = [f"--suicide={step}:{rank}" for step, rank in ((7, 0), (20, 2), (33, 1))]
    run = launch(*options(folder, spares=3), program=suicides)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert len(summary["failures"]) == 3
    assert summary["checkpoints"][-1] == 60
    assert set(contents(folder)) == set(steps(folder))


def test_when_all_copies_in_memory_are_lost_the_newest_file_is_taken(
    launch: Launch, undisturbed: str, folder: Path
) -> None:
    run = launch(*options(folder, every=5, spares=3))
    run.wait_for_step(22)
    for entry in run.ranks():
        if entry["role"] == "active":
            os.kill(entry["pid"], signal.SIGKILL)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert summary["restored_step"] >= 15
    assert {f["action"] for f in summary["failures"]} == {"substitute"}
    assert "restored from" in run.output


def test_when_all_is_lost_before_the_first_checkpoint_that_is_said(
    launch: Launch, folder: Path
) -> None:
    suicides = ["--suicide=7:0", "--suicide=7:1", "--suicide=7:2"]
    run = launch(*options(folder, every=50, spares=3), program=suicides)
    assert "there is no checkpoint" in run.finish(code=3)["reason"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    launch: Launch, undisturbed: str, folder: Path
) -> None:
    launch(*options(folder, every=20), program=["--steps", "40"]).finish()
    newest = Store(folder).committed()[-1].state
    with h5py.File(newest) as content:
        place = content["model/0.weight"].id.get_offset()
    with newest.open("r+b") as file:
        file.seek(place + 100)
        file.write(b"damage")
    run = launch(*options(folder, every=20))
    summary = run.finish()
    assert "model/0.weight" in run.output
    assert summary["restored_step"] == 20
    assert summary["params_sha256"] == undisturbed
    assert "the checkpoint of step 40 is no good" in run.output


def test_a_checkpoint_of_another_model_is_refused(launch: Launch, folder: Path) -> None:
    launch(*options(folder), program=["--steps", "2"]).finish()
    run = launch(*options(folder), program=["--width", "16"])
    assert "does not fit this training" in run.finish(code=1)["reason"]


def test_time_between_checkpoints(launch: Launch, folder: Path) -> None:
    summary = launch(*options(folder, every="0.2s"), program=["--pace", "0.05"]).finish()
    # 60 steps of at least 0.05 s; the last is saved in any case.
    assert len(summary["checkpoints"]) >= 3
    assert summary["checkpoints"][-1] == 60


def test_a_directory_that_cannot_be_made_is_said(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = launch(*options(tmp_path / "file" / "checkpoints"))
    reason = run.finish(code=1)["reason"]
    assert "the checkpoint directory cannot be made" in reason
    assert "give another --ckpt-dir" in reason
