"""What spares do while others train, and that they drop it when they are needed."""

from __future__ import annotations

import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy
import psutil
import pytest
from training import Training, family, wait_for

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.restore import load
from hpcft.ckpt.store import Store
from hpcft.report import story
from hpcft.report.record import Status
from hpcft.world.progress import shepherd_of

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi

#: Seconds for a process that gets only what others leave of the processors.
PATIENCE = 240


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[Training] = []

    def start(
        nproc: int, spares: int, every: int, *program: str, does: str = "evaluate"
    ) -> Training:
        options = ["--nproc", str(nproc), "--spares", str(spares)]
        options += ["--ckpt-dir", str(tmp_path / "saved"), "--ckpt-every", str(every)]
        options += ["--ckpt-keep", "1000"]
        if does:
            options += ["--spares-do", does]
        if does == "drain":
            options += ["--ckpt-near", f"1:{tmp_path / 'near'}"]
        run = Training(tmp_path / f"run{len(started)}", options)
        run.program += ["--until", str(tmp_path / "hurry"), *program]
        started.append(run.start())
        return run

    yield start
    for run in started:
        run.stop()


def evaluations(run: Training) -> list[dict[str, float]]:
    return [
        {"step": event["step"], **event["detail"]["metrics"], "world": event["detail"]["world"]}
        for event in run.events()
        if event["kind"] == "evaluation"
    ]


def test_each_checkpoint_is_evaluated_by_one_of_the_spares(launch: Launch, tmp_path: Path) -> None:
    run = launch(2, 2, 3, "--steps", "3000", "--pace", "0.2", "--evaluate", "0")
    wait_for(
        "evaluations",
        lambda: len(evaluations(run)) >= 3 or run.process.poll() is not None,
        PATIENCE,
    )
    run.process.send_signal(signal.SIGTERM)
    run.wait(75)
    found = evaluations(run)
    assert max(Counter(one["step"] for one in found).values()) == 1
    assert {one["world"] for one in found} <= {2, 3}
    compared = 0
    for checkpoint in Store(tmp_path / "saved").committed():
        known = [one["weight"] for one in found if one["step"] == checkpoint.step]
        # Not of one that was dropped between the two, as training ended.
        if known and "validation/weight" in checkpoint.metrics:
            with h5py.File(checkpoint.state) as file:
                parameters = [file[f"model/{name}"] for name in PARAMETERS]
                weight = sum(numpy.sum(p[:], dtype=float) for p in parameters)
            assert known[0] == pytest.approx(weight, rel=1e-9)
            assert checkpoint.metrics["validation/weight"] == known[0]
            compared += 1
    assert compared >= 2
    assert "evaluated step" in run.output
    status = Status("a run", "interrupted", True, "", None, None, 0.0)
    told = story.tell(run.run_dir, status).as_json()
    [curve] = [one for one in told["curves"] if one["name"] == "validation/weight"]
    assert len(curve["points"]) == len(found)


#: Of the model that is trained; the rest are buffers.
PARAMETERS = ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]


def test_a_spare_that_is_adopted_drops_what_it_evaluates(
    launch: Launch, undisturbed: str, tmp_path: Path
) -> None:
    run = launch(3, 1, 2, "--pace", "4", "--evaluate", "3600")
    log = run.run_dir / "logs" / "rank-3.log"
    pid = wait_for(
        "an evaluation",
        lambda: log.exists() and re.search(r"^evaluating step \d+ in (\d+)", log.read_text(), re.M),
        PATIENCE,
    )[1]
    evaluator = psutil.Process(int(pid))
    workers = wait_for("its worker", evaluator.children)
    run.send(1)
    wait_for("the adoption", lambda: run.entry(1)["world"] == 3)
    # Training goes on, and nothing of the evaluation is left.
    _, left = psutil.wait_procs([evaluator, *workers], timeout=20)
    assert not left
    assert run.process.poll() is None
    adopted = psutil.Process(run.entry(1)["pid"])
    assert adopted.children(recursive=True) == []
    (tmp_path / "hurry").touch()
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert [failure["action"] for failure in summary["failures"]] == ["substitute"]
    assert evaluations(run) == []
    assert not family(run.run_dir)


def test_a_script_without_anything_to_evaluate_with_is_told(launch: Launch) -> None:
    run = launch(2, 1, 1000, "--steps", "20")
    run.finish()
    assert "job.run() is given no evaluate=" in run.output


def checkpoints(run: Training, writer: int | None, after: int = 0) -> list[int]:
    """The steps of those committed that a spare has written, or with None the ranks."""
    return [
        event["step"]
        for event in run.events()
        if event["kind"] == "checkpoint"
        and event["detail"].get("world") == writer
        and event["step"] > after
    ]


def drainer(run: Training, spare: int) -> psutil.Process:
    """The process that writes checkpoints beside a spare."""
    pid = next(entry["pid"] for entry in run.ranks() if entry["world"] == spare)
    [found] = [
        process
        for process in map(psutil.Process, family(run.run_dir))
        # Nothing else of the shepherd's is as nice.
        if shepherd_of(process.pid) == shepherd_of(pid) and process.nice() == 19
    ]
    return found


def test_a_spare_writes_the_checkpoints_as_long_as_there_is_one(
    launch: Launch, undisturbed: str, tmp_path: Path
) -> None:
    run = launch(3, 2, 6, "--pace", "3", does="drain")
    wait_for("the spare to write", lambda: len(checkpoints(run, 3)) >= 2, PATIENCE)
    drainer(run, 3).kill()
    died = run.step() + 1
    wait_for("the ranks to write", lambda: checkpoints(run, None, died), PATIENCE)
    # The next spare takes over what the first was to do.
    run.send(1)
    wait_for("the adoption", lambda: run.entry(1)["world"] == 3)
    wait_for("the other spare to write", lambda: checkpoints(run, 4), PATIENCE)
    writes = drainer(run, 4)
    run.send(2)
    wait_for("the adoption", lambda: run.entry(2)["world"] == 4)
    _, left = psutil.wait_procs([writes], timeout=20)
    assert not left
    (tmp_path / "hurry").touch()
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    last = summary["failures"][-1]["step"]
    assert 60 in checkpoints(run, None, last)
    assert not checkpoints(run, 3, last) + checkpoints(run, 4, last)
    assert "the ranks do so themselves: its process has ended" in run.output
    # Neither spare has left anything.
    saved = [entry.name for entry in (tmp_path / "saved").iterdir() if entry.is_dir()]
    assert all(name.startswith("step-") for name in saved)
    assert not any((tmp_path / "near").iterdir())
    for checkpoint in Store(tmp_path / "saved").committed():
        assert load(checkpoint.state, Engine(16 << 20))[0] == checkpoint.step


def test_a_run_goes_on_from_what_a_spare_has_written(
    launch: Launch, undisturbed: str, tmp_path: Path
) -> None:
    run = launch(3, 1, 6, "--pace", "3", does="drain")
    wait_for("the spare to write", lambda: len(checkpoints(run, 3)) >= 2, PATIENCE)
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)
    newest = checkpoints(run, 3)[-1]
    for checkpoint in Store(tmp_path / "saved").committed():
        if checkpoint.step > newest:
            shutil.rmtree(checkpoint.path)
    (tmp_path / "hurry").touch()
    # What lies in memory is none of its business.
    summary = launch(3, 0, 1000, does="").finish()
    assert summary["restored_step"] == newest
    assert summary["params_sha256"] == undisturbed
    saved = [entry.name for entry in (tmp_path / "saved").iterdir() if entry.is_dir()]
    assert all(name.startswith("step-") for name in saved)
