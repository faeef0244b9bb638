"""What saves cost training, as a rank measures it, on a clock of the test's."""

from __future__ import annotations

import pytest

from hpcft.train import rhythm
from hpcft.train.rhythm import Meter


class Steps:
    """Steps of a training that take what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.meter = Meter()
        self._save: object | None = None
        monkeypatch.setattr(rhythm.time, "monotonic", lambda: self.now)

    def step(
        self, seconds: float, copied: float = 0, edge: float = 0, save: object | None = None
    ) -> None:
        """The optimizer waits for ``copied`` of the seconds; then comes the edge."""
        self.now += seconds
        self.meter.copied(copied)
        began, before, self._save = self.now, self._save, save
        self.now += edge
        self.meter.edge(began, before, save)


def test_a_save_costs_what_it_holds_up_and_slows_down(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    for _ in range(10):
        steps.step(1)
    assert steps.meter.found is None
    steps.step(1, edge=0.5, save="a")
    steps.step(1.2 + 3, copied=3, edge=0.1, save="a")
    steps.step(1.2, edge=0.1)
    # 0.5 to begin, 3 to copy, two edges of 0.1 and two steps that are slower by 0.2.
    assert steps.meter.found == pytest.approx((0.5 + 3 + 0.2 + 0.4, 0.5 + 4.2 + 0.1 + 1.2 + 0.1))


def test_one_that_follows_at_once_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.step(1)
    steps.step(1, edge=0.5, save="a")
    steps.step(1, edge=0.5, save="b")
    steps.step(1)
    assert steps.meter.found == pytest.approx((0.75, 1.75))


def test_what_a_script_does_now_and_then_is_no_cost_of_a_save(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = Steps(monkeypatch)
    for _ in range(5):
        steps.step(1)
    steps.step(100)
    steps.step(1, edge=0.5, save="a")
    for seconds in (1, 1, 100, 1):
        steps.step(seconds, save="a")
    steps.step(1)
    assert steps.meter.found is not None
    assert steps.meter.found[0] == pytest.approx(0.5)


def test_a_save_in_which_ranks_have_failed_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Steps(monkeypatch)
    steps.step(1)
    steps.step(1, edge=50, save="a")
    steps.meter.restart()
    steps.step(1)
    steps.step(1)
    assert steps.meter.found is None
