"""Trainings with FSDP2: saved by some ranks and continued by others, and healed in place."""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from training import HERE, Training, family, wait_for

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.restore import load
from hpcft.ckpt.store import Store

Launch = Callable[..., Training]
SCRIPT = str(HERE / "programs" / "train_fsdp.py")

pytestmark = pytest.mark.mpi


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def train(tmp_path: Path, folder: Path) -> Iterator[Launch]:
    """Starts trainings with shards; those still running at the test's end are ended."""
    started: list[Training] = []

    def start(
        *program: str, nproc: int = 4, every: str = "5", more: tuple[str, ...] = ()
    ) -> Training:
        options = ["--nproc", str(nproc), "--ckpt-dir", str(folder), "--ckpt-every", every, *more]
        run = Training(tmp_path / f"run{len(started)}", options, [SCRIPT, *program])
        started.append(run.start())
        return run

    yield start
    for run in started:
        run.stop()


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Store(folder).committed()]


def newest(folder: Path) -> Any:
    return load(Store(folder).committed()[-1].state, Engine(16 << 20))[1]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return bool(a.keys() == b.keys() and all(same(a[key], b[key]) for key in a))
    return bool(a == b)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a training comes to that nothing happens to; each kind is run once."""

    @functools.cache
    def content(nproc: int, *program: str) -> Any:
        place = tmp_path_factory.mktemp("undisturbed")
        options = ["--nproc", str(nproc), "--ckpt-dir", str(place / "checkpoints")]
        Training(place / "run", options, [SCRIPT, *program]).start().finish()
        return newest(place / "checkpoints")

    return content


def test_killed_altogether_the_same_ranks_come_to_the_same_end(
    train: Launch, folder: Path, undisturbed: Callable[..., Any]
) -> None:
    run = train("--pace", "0.1", nproc=2)
    wait_for("a checkpoint", lambda: folder.exists() and steps(folder))
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)
    summary = train(nproc=2).finish()
    assert 0 < summary["restored_step"] < 20
    assert same(newest(folder), undisturbed(2))


@pytest.mark.parametrize(
    ("layout", "saved", "restored"),
    [
        ("shared", (4, ()), (3, ())),
        ("per-rank", (3, ()), (2, ("--tensor-parallel", "2"))),
        ("shared", (4, ("--tensor-parallel", "2")), (1, ())),
    ],
)
def test_other_numbers_of_ranks_go_on_from_exactly_what_was_saved(
    train: Launch,
    folder: Path,
    tmp_path: Path,
    layout: str,
    saved: tuple[int, tuple[str, ...]],
    restored: tuple[int, tuple[str, ...]],
) -> None:
    nproc, program = saved
    train("--steps", "5", *program, nproc=nproc, more=("--ckpt-layout", layout)).finish()
    assert len(list(folder.glob("step-*/shard-*.h5"))) == (nproc if layout == "per-rank" else 0)
    content = newest(folder)
    assert content["model"]["0.weight"].shape == (300, 64)
    nproc, program = restored
    file = tmp_path / "dump.pt"
    run = train("--steps", "5", "--dump", str(file), *program, nproc=nproc)
    assert run.finish()["restored_step"] == 5
    found = torch.load(file)
    assert same(found["model"], content["model"])
    assert same(found["optimizer"], content["optimizer"]["state"])


def killed_after_a_save(run: Training, folder: Path, rank: int) -> list[int]:
    """Wait for a checkpoint, kill a rank; the process numbers of all others."""
    wait_for("a checkpoint", lambda: folder.exists() and steps(folder))
    others = [entry["pid"] for entry in run.ranks() if entry["logical"] != rank]
    run.send(rank)
    return others


@pytest.mark.parametrize(
    ("nproc", "victim", "program"),
    [
        (2, 0, ()),
        (4, 2, ("--tensor-parallel", "2")),
        (4, 1, ("--replicas", "2")),
    ],
)
def test_a_spare_takes_over_and_all_go_on_from_the_checkpoint(
    train: Launch,
    folder: Path,
    undisturbed: Callable[..., Any],
    nproc: int,
    victim: int,
    program: tuple[str, ...],
) -> None:
    run = train("--pace", "0.1", *program, nproc=nproc, more=("--spares", "1"))
    others = killed_after_a_save(run, folder, victim)
    wait_for("a step after it", lambda: any(e["kind"] == "recovered" for e in run.events()))
    assert sorted(entry["pid"] for entry in run.ranks()) == sorted(others)
    assert set(others) <= set(family(run.run_dir))
    summary = run.finish()
    (failure,) = summary["failures"]
    assert (failure["ranks"], failure["action"]) == ([victim], "substitute")
    assert failure["step"] == summary["restored_step"] in (5, 10, 15)
    assert 0 <= failure["lost_steps"] < 15
    assert f"from the checkpoint of step {failure['step']}" in run.output
    assert same(newest(folder), undisturbed(nproc, *program))
    # Each has built it twice, and had let go of the first.
    built = re.findall(r"built rank \d size \d, (\d) states before it", run.logs())
    assert built == ["0"] * (2 * nproc + 1)


def test_without_a_spare_fewer_ranks_go_on(train: Launch, folder: Path) -> None:
    run = train("--pace", "0.1", "--on-shrink", "scale-lr", nproc=3)
    killed_after_a_save(run, folder, 1)
    summary = run.finish()
    assert summary["world"] == {"initial": 3, "final": 2, "spares_left": 0}
    assert summary["failures"][0]["action"] == "shrink"
    assert newest(folder)["model"]["0.weight"].shape == (300, 64)
    assert newest(folder)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-2 * 2 / 3)
    assert steps(folder)[-1] == 20


def test_shards_come_from_memory_where_that_is_newer(
    train: Launch, folder: Path, tmp_path: Path, undisturbed: Callable[..., Any]
) -> None:
    near = tmp_path / "near"
    near.mkdir()
    more = ("--spares", "1", "--ckpt-near", f"3:{near}")
    run = train("--pace", "0.1", nproc=2, every="1000", more=more)
    begun = "hpcft-near-*/*-*/state.h5"
    # A second one has been begun, so that one is complete.
    wait_for("checkpoints", lambda: len(list(near.glob(begun))) > 1)
    run.send(1)
    summary = run.finish()
    # The first is begun as soon as there are ranks.
    assert summary["restored_step"] >= 1
    assert "on the nodes" in run.output
    assert same(newest(folder), undisturbed(2))


def test_one_after_the_other(train: Launch, folder: Path, undisturbed: Callable[..., Any]) -> None:
    run = train("--pace", "0.1", nproc=2, more=("--spares", "2"))
    killed_after_a_save(run, folder, 1)
    wait_for("a step after it", lambda: any(e["kind"] == "recovered" for e in run.events()))
    run.send(0)
    summary = run.finish()
    assert [failure["ranks"] for failure in summary["failures"]] == [[1], [0]]
    assert summary["world"]["spares_left"] == 0
    assert same(newest(folder), undisturbed(2))


def test_a_failure_while_the_script_is_run_anew(
    train: Launch, folder: Path, undisturbed: Callable[..., Any]
) -> None:
    # The other survivor: rank 0 dies building its model for the second time.
    run = train("--pace", "0.1", "--die-anew", "0", nproc=2, more=("--spares", "2"))
    killed_after_a_save(run, folder, 1)
    summary = run.finish()
    first, second = summary["failures"]
    assert (first["ranks"], second["ranks"]) == ([1], [0])
    assert second["lost_steps"] == 0
    assert same(newest(folder), undisturbed(2))


def test_with_nothing_saved_yet_training_begins_again(
    train: Launch, folder: Path, undisturbed: Callable[..., Any]
) -> None:
    run = train("--pace", "0.1", nproc=2, every="1000", more=("--spares", "1"))
    run.wait_for_step(3)
    run.send(1)
    summary = run.finish()
    (failure,) = summary["failures"]
    assert failure["step"] == 0
    assert failure["lost_steps"] >= 3
    assert same(newest(folder), undisturbed(2))


def test_without_checkpoints_a_lost_shard_ends_the_run(tmp_path: Path) -> None:
    options = ["--nproc", "2", "--spares", "1"]
    run = Training(tmp_path / "run", options, [SCRIPT, "--steps", "1000", "--pace", "0.1"]).start()
    run.wait_for_step(3)
    run.send(1)
    reason = run.finish(code=3)["reason"]
    assert "its shard of the training state, which no other holds" in reason
    assert "--ckpt-dir" in reason


def test_a_spare_that_dies_costs_nothing_but_the_spare(tmp_path: Path) -> None:
    options = ["--nproc", "2", "--spares", "2"]
    end = str(tmp_path / "end")
    script = [SCRIPT, "--steps", "100", "--pace", "0.5", "--until", end]
    run = Training(tmp_path / "run", options, script).start()
    run.wait_for_step(1)
    spare, other = [entry for entry in run.ranks() if entry["role"] == "spare"]
    os.kill(spare["pid"], signal.SIGKILL)
    # On record while training goes on.
    wait_for("the others to be listed", lambda: spare not in run.ranks())
    Path(end).touch()
    summary = run.finish()
    assert summary["steps"] == 100
    (failure,) = summary["failures"]
    assert (failure["role"], failure["action"], failure["lost_steps"]) == ("spare", "none", 0)
    assert failure["cause"] == "killed by SIGKILL"
    assert summary["world"] == {"initial": 2, "final": 2, "spares_left": 1}
    kinds = [event["kind"] for event in run.events() if "straggler" not in event["kind"]]
    assert kinds == ["start", "failure", "detection", "finish"]
    assert f"spare {spare['world']} on {spare['host']} failed (killed by SIGKILL)" in run.output
    assert run.logs().count("built rank") == 4
    assert other in run.ranks()


def test_a_script_that_is_wrong_is_run_anew_once(train: Launch, folder: Path) -> None:
    run = train("--raise-at", "7", nproc=2, more=("--spares", "3"))
    assert "rank 1 failed twice at step 7 in the same way" in run.finish(code=1)["reason"]


def test_a_damaged_checkpoint_is_left_for_the_one_before(train: Launch, folder: Path) -> None:
    train("--steps", "10", nproc=2).finish()
    file = Store(folder).committed()[-1].state
    with h5py.File(file) as content:
        place = content["optimizer/state/0/exp_avg"].id.get_offset()
    with file.open("r+b") as raw:
        raw.seek(place + 50_000)
        raw.write(b"damage")
    run = train("--steps", "10", nproc=3)
    assert run.finish()["restored_step"] == 5
    assert "damaged are /optimizer/state/0/exp_avg" in run.output
