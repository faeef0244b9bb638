"""What spares do while others train, and that they drop it when they are needed."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy
import psutil
import pytest
from training import Training, family, wait_for

from hpcft.ckpt.store import Store
from hpcft.report import story
from hpcft.report.record import Status

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi

#: Seconds for a process that gets only what others leave of the processors.
PATIENCE = 240


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    started: list[Training] = []

    def start(nproc: int, spares: int, every: int, *program: str) -> Training:
        options = ["--nproc", str(nproc), "--spares", str(spares), "--spares-do", "evaluate"]
        options += ["--ckpt-dir", str(tmp_path / "saved"), "--ckpt-every", str(every)]
        options += ["--ckpt-keep", "1000"]
        run = Training(tmp_path / "run", options)
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
