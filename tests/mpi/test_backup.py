"""Steps go on without the gradients of ranks that are late."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training import HERE, Training, wait_for

from hpcft.ckpt.store import Store

pytestmark = pytest.mark.mpi

Launch = Callable[..., Training]
TALLY = str(HERE / "programs" / "tally.py")


def steps_of(run: Training, rank: int) -> list[int]:
    """The steps that a process, which plays this rank, has said it has completed."""
    log = (run.run_dir / f"logs/rank-{rank}.log").read_text()
    return [int(n) for n in re.findall(rf"^step (\d+) rank {rank}\b", log, re.M)]


def digests(run: Training) -> set[str]:
    return set(re.findall(r"^digest \w+", run.logs(), re.M))


def tally(run: Training, tmp_path: Path, *arguments: str) -> Training:
    program = [TALLY, "--out", str(tmp_path / "tally"), *arguments]
    environ = run.environ | {"GO_ON": str(tmp_path / "go-on")}
    return replace(run, program=program, environ=environ).start()


def test_a_step_averages_what_has_come_and_an_epoch_has_every_sample_once(tmp_path: Path) -> None:
    # 80 samples in steps of 3 x 4, the last rank late in the third.
    run = Training(tmp_path / "run", ["--nproc", "3", "--backup", "1"])
    run = tally(run, tmp_path, "--missing", "2")
    run.wait_for_step(5)
    (tmp_path / "go-on").touch()
    run.finish()
    steps, weights = torch.load(tmp_path / "tally")
    assert 3 not in steps_of(run, 2)
    # Each step has learnt from as many samples as there were, and gone as far in all.
    torch.testing.assert_close(-weights.sum().item(), float(steps))
    learnt = Counter(round(-1 / w) for w in weights.tolist() if w)
    assert learnt.keys() <= {8, 12}
    assert learnt[8]
    # No sample has counted twice, and what fills no step any more is less than one.
    assert all(samples % n == 0 for n, samples in learnt.items())
    assert 0 <= 80 - learnt.total() < 12


def test_ranks_may_fail_while_others_are_late(launch: Launch) -> None:
    arguments = ["--pace", "0.02", "--steps", "150", "--late", "1", "0.3", "0.5"]
    run = launch("--nproc", "4", "--spares", "1", "--backup", "1", program=arguments)
    run.wait_for_step(20)
    run.send(0)
    wait_for("the spare", lambda: [e for e in run.events() if e["kind"] == "resume"])
    run.wait_for_step(60)
    run.send(1)
    summary = run.finish()
    assert [f["action"] for f in summary["failures"]] == ["substitute", "shrink"]
    assert summary["steps"] == 150
    assert len(digests(run)) == 1


def test_rank_0_saves_alone_and_all_leave_at_the_same_step(launch: Launch, tmp_path: Path) -> None:
    places = ["--ckpt-dir", str(tmp_path / "ckpt"), "--ckpt-near", f"3:{tmp_path}/near"]
    options = ["--nproc", "3", "--backup", "1", "--ckpt-every", "5", *places]
    arguments = ["--pace", "0.02", "--steps", "80", "--late", "0", "0.3", "0.3"]
    run = launch(*options, program=arguments)
    store = Store(tmp_path / "ckpt")
    wait_for("a checkpoint", lambda: store.committed())
    run.wait_for_step(30)
    run.process.send_signal(signal.SIGTERM)
    first = run.finish(75)
    assert first["checkpoints"][-1] == first["steps"] >= 30
    assert len(first["checkpoints"]) > 1
    run = launch(*options, program=arguments)
    second = run.finish()
    assert second["restored_step"] == first["steps"]
    assert second["steps"] == second["checkpoints"][-1] == 80
    assert len(digests(run)) == 1


@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ("--collective", "the script calls a collective of torch.distributed"),
        ("--unused", "cannot train with find_unused_parameters"),
    ],
)
def test_what_would_wait_for_late_ranks_is_refused(
    tmp_path: Path, argument: str, error: str
) -> None:
    run = Training(tmp_path / "run", ["--nproc", "2", "--backup", "1"])
    run = tally(run, tmp_path, argument)
    run.wait(1)
    assert error in run.output
