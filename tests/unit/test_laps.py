"""Laps: what is written is what is read, whatever cuts a file short."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.telemetry import laps
from hpcft.telemetry.laps import Lap, bucket, middle
from hpcft.train.pace import Pace
from hpcft.world.progress import Progress
from hpcft.world.recovery import World

finite = st.floats(0, 1e9, allow_nan=False)
some = st.builds(
    Lap,
    world=st.integers(0, 3),
    rank=st.integers(0, 3),
    epoch=st.integers(0, 9),
    first=st.integers(1, 1000),
    last=st.integers(1000, 2000),
    began=finite,
    ended=finite,
    compute=finite,
    waiting=finite,
    saving=finite,
    buckets=st.dictionaries(st.integers(-200, 200), st.integers(1, 9)),
    metrics=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False)),
)


@given(st.lists(some), st.integers(1, 40))
def test_what_is_cut_short_is_passed_over(written: list[Lap], torn: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        laps.append(Path(folder), written)
        assert sorted(laps.read(Path(folder)), key=repr) == sorted(written, key=repr)
        if written:
            file = Path(folder, f"rank-{written[-1].world}.jsonl")
            file.write_bytes(file.read_bytes()[:-torn])
            left = laps.read(Path(folder))
            assert len(left) >= len(written) - 1
            assert all(lap in written for lap in left)


@given(st.floats(1e-6, 1e6))
def test_a_bucket_is_narrow(seconds: float) -> None:
    assert middle(bucket(seconds)) == pytest.approx(seconds, rel=0.05)


def test_what_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    lap = Lap(0, 0, 0, 1, 1, 0, 1, 1, 0, 0, {0: 1}, {"loss": float("nan"), "lr": 0.1})
    laps.append(tmp_path, [lap])
    assert laps.read(tmp_path)[0].metrics == {"lr": 0.1}


class Clock:
    """The time, as the test has it go by."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_step_is_computing_waiting_and_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for name in ("time", "monotonic"):
        monkeypatch.setattr(f"hpcft.train.pace.time.{name}", clock)
    progress = Progress.create()
    world = SimpleNamespace(
        world=2, logical=1, membership=SimpleNamespace(epoch=0), progress=progress
    )
    pace = Pace(tmp_path, cast(World, world))

    def step(number: int, compute: float, waiting: float, saving: float, **metrics: Any) -> None:
        pace.begin()
        clock.now += compute
        with progress.waiting():
            clock.now += waiting
        pace.committed(number, metrics)
        clock.now += saving
        pace.ended()

    step(1, 0.05, 0.02, 0.01, loss=3.0)
    step(2, 0.05, 0.03, 0.0, loss=2.0)
    world.membership.epoch = 1
    # A recovery ends the lap; what it takes is none's.
    pace.lap()
    clock.now += 5
    step(3, 2.0, 0.0, 0.5, loss="none")
    step(4, 0.125, 0.0, 0.0)
    # Others have made steps 5 to 7 while this rank had its gradients for the first of them.
    pace.begin()
    clock.now += 1.0
    pace.late()
    step(8, 0.25, 0.0, 0.0)
    pace.close()
    first, second, third = laps.read(tmp_path)
    assert (first.world, first.rank, first.epoch, first.first, first.last) == (2, 1, 0, 1, 2)
    assert first.compute == pytest.approx(0.1)
    assert first.waiting == pytest.approx(0.05)
    assert first.saving == pytest.approx(0.01)
    assert first.began == 1000
    assert first.ended == pytest.approx(1000.16)
    assert first.buckets == {bucket(0.05): 2}
    assert first.metrics == {"loss": 2.0}
    assert (second.first, second.last, second.epoch, second.metrics) == (3, 3, 1, {})
    assert second.saving == pytest.approx(0.5)
    assert (third.first, third.last, third.steps) == (4, 8, 2)
    assert (third.missed, third.late) == (3, 1)
    assert third.compute == pytest.approx(1.375)
    assert third.buckets == {bucket(0.125): 1, bucket(1.0): 1, bucket(0.25): 1}
