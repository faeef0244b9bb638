"""What spares find of checkpoints, where people look for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import event, eventful, leave, start, status, steps
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpcft.errors import HpcftError
from hpcft.launch.chronicle import Chronicle
from hpcft.report import page, story
from hpcft.report.curves import curves, validation
from hpcft.telemetry.events import Event
from hpcft.telemetry.laps import Tally
from hpcft.telemetry.rundir import RunDirectory
from hpcft.train.evaluation import numbers
from hpcft.train.tensorboard import write_once
from hpcft.watch.metrics import families


def found(at: float, step: int, **metrics: float) -> Event:
    return event("evaluation", at, step, metrics=metrics, seconds=2.0, world=3)


def test_they_are_curves_of_the_report(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [
            start(0, 1, 1),
            found(30, 20, loss=0.5, accuracy=0.7),
            # A slower spare comes later with an earlier step.
            found(35, 10, loss=0.9, accuracy=0.6),
            event("finish", 60, 50, params_sha256="0"),
        ],
        steps(0, 1, 50, 10, metrics={"loss": 10.0}),
    )
    told = story.tell(path, status())
    by_name = {curve.name: curve for curve in told.curves}
    assert list(by_name) == ["loss", "validation/loss", "validation/accuracy"]
    assert [(p.step, p.value) for p in by_name["validation/loss"].points] == [(10, 0.9), (20, 0.5)]
    assert "validation/accuracy" in page.draw(told)


def test_of_a_step_done_again_the_last_counts() -> None:
    [curve] = curves(validation([found(1, 10, x=1.0), found(2, 20, x=2.0), found(9, 20, x=3.0)]))
    assert [(p.step, p.value, p.counts) for p in curve.points] == [
        (10, 1.0, True),
        (20, 2.0, False),
        (20, 3.0, True),
    ]


def test_prometheus_has_the_newest(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run", [start(0, 1, 1), found(30, 20, loss=0.5), found(35, 10, loss=0.9)]
    )
    samples = {
        (sample.name, sample.labels.get("name")): sample.value
        for family in families("r", RunDirectory(path), Tally(path / "laps"))
        for sample in family.samples
    }
    assert samples["hpcft_validation_metric", "loss"] == 0.5
    assert samples["hpcft_last_evaluation_step", None] == 20
    assert samples["hpcft_evaluation_seconds_sum", None] == 4.0


def test_without_any_prometheus_has_none(tmp_path: Path) -> None:
    path = eventful(tmp_path / "run", {"loss": 1.0})
    names = {family.name for family in families("r", RunDirectory(path), Tally(path / "laps"))}
    assert not any("validation" in name or "evaluation" in name for name in names)


def test_tensorboard_shows_those_of_several_spares(tmp_path: Path) -> None:
    for step in (20, 10, 30):
        write_once(tmp_path / "validation", step, {"loss": step / 10})
    seen = EventAccumulator(str(tmp_path / "validation"))
    seen.Reload()
    shown = [(scalar.step, pytest.approx(scalar.value)) for scalar in seen.Scalars("loss")]
    assert sorted(shown, key=lambda one: one[0]) == [(10, 1.0), (20, 2.0), (30, 3.0)]


@pytest.mark.parametrize("verbose", [False, True])
def test_they_are_written_down_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verbose: bool
) -> None:
    rundir = RunDirectory(tmp_path)
    chronicle = Chronicle(rundir, verbose)
    chronicle.evaluated(120, 2, 5, {"loss": 0.25}, 1.5)
    chronicle.unevaluated(140, 2, 5, "ValueError: bad")
    chronicle.unevaluated(-1, 2, 5, "no memory")
    first, second, third = rundir.events()
    assert (first.kind, first.step, first.epoch) == ("evaluation", 120, 2)
    assert first.detail == {"metrics": {"loss": 0.25}, "seconds": 1.5, "world": 5}
    assert [second.kind, third.kind] == ["evaluation failed"] * 2
    assert second.detail["why"] == "ValueError: bad"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 * verbose
    if verbose:
        assert said[0] == "hpcft: evaluated step 120:  loss 0.25  (1.5 s, spare 5)"
        assert "step 140 could not be evaluated: ValueError: bad" in said[1]


def test_a_full_disk_keeps_nobody_from_saying_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Chronicle(RunDirectory(tmp_path / "gone"), True).evaluated(1, 0, 3, {"loss": 1.0}, 1.0)
    assert "evaluated step 1" in capsys.readouterr().err


def test_metrics_may_be_tensors() -> None:
    assert numbers({"loss": torch.tensor(0.5), "right": 3}) == {"loss": 0.5, "right": 3.0}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (lambda: 0.5, "returned float, and not metrics by name"),
        (lambda: None, "returned nothing"),
        (dict, "returned nothing, and not metrics by name"),
        (lambda: {"loss": "low"}, "a metric that is no number"),
        (lambda: {"loss": torch.ones(2)}, "a metric that is no number"),
    ],
)
def test_what_is_no_metric_is_said(value: Callable[[], object], said: str) -> None:
    with pytest.raises(HpcftError, match=said):
        numbers(value())
