"""What a campaign comes to, from many lives of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from scipy import stats

from hpcft.foresight.scenario import HOUR, Scenario
from hpcft.foresight.simulator import COUNTS, Life, live
from hpcft.foresight.trace import Strike
from hpcft.report.goodput import Goodput


@dataclass(frozen=True)
class Mean:
    """A mean over lives, and the interval in which the true one lies with 95 % confidence."""

    mean: float
    low: float
    high: float

    @property
    def margin(self) -> float:
        """How far the interval's ends are from the mean."""
        return max(self.mean - self.low, self.high - self.mean)


def mean_of(values: Sequence[float]) -> Mean:
    """By Student's t; of one value nothing is known but the value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Mean(mean, -math.inf, math.inf)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Mean(mean, mean - reach, mean + reach)


@dataclass(frozen=True)
class Forecast:
    """What is to be expected.

    runs: how many lives.
    part: the share of the time that goes into steps that count, as ``hpcft report`` measures it.
    between: the ``part`` of 9 of 10 lives lies between these.
    work: the same as ``part``, less what is lost by training on fewer nodes.
    worst: the ``work`` that 19 of 20 lives reach.
    goodput: where the time goes, mean.
    counts: of each of :data:`hpcft.foresight.simulator.COUNTS`, mean over the lives.
    short: the share of the time with fewer than all nodes training.
    least: the fewest nodes that trained in any life.
    node_hours: what is paid for, spares included.
    cost: of these; and what of it went into no steps that count, spares' part included.
    """

    scenario: Scenario
    runs: int
    part: Mean
    between: tuple[float, float]
    work: Mean
    worst: float
    goodput: Goodput
    counts: dict[str, float]
    short: Mean
    least: int
    node_hours: float
    cost: float
    wasted: float

    @property
    def yield_(self) -> float:
        """Useful node-hours of all that are paid for: what spares are worth is seen here."""
        machine = self.scenario.machine
        return self.work.mean * machine.nodes / (machine.nodes + machine.spares)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["scenario"]
        found |= {name: asdict(getattr(self, name)) for name in ("part", "work", "short")}
        goodput = {"part": self.goodput.part, "whole": self.goodput.whole, **self.goodput.parts}
        return found | {"goodput": goodput, "yield": self.yield_}


def simulate(
    scenario: Scenario, runs: int = 32, seed: int = 0, trace: Sequence[Strike] | None = None
) -> Forecast:
    """Play a campaign through ``runs`` times.

    The same seed gives the same lives; two scenarios with the same seed share their luck as far
    as they ask for it in the same order, which sharpens comparisons.

    Parameters
    ----------
    trace: as of :func:`hpcft.foresight.simulator.live`.

    Raises
    ------
    UsageError: the scenario makes no sense.
    """
    scenario.checked()
    seeds = np.random.SeedSequence(seed).spawn(runs)
    lives = [live(scenario, np.random.default_rng(one), trace) for one in seeds]
    return _over(scenario, lives)


def _over(scenario: Scenario, lives: Sequence[Life]) -> Forecast:
    whole = scenario.seconds
    works = [life.work / whole for life in lives]
    shares = [life.goodput.part for life in lives]
    low, high = np.quantile(shares, (0.05, 0.95))
    parts = {
        field.name: math.fsum(getattr(life.goodput, field.name) for life in lives) / len(lives)
        for field in fields(Goodput)
    }
    machine = scenario.machine
    node_hours = (machine.nodes + machine.spares) * whole / HOUR
    work = mean_of(works)
    cost = node_hours * scenario.site.price
    useful = work.mean * machine.nodes / (machine.nodes + machine.spares)
    return Forecast(
        scenario,
        len(lives),
        mean_of(shares),
        (float(low), float(high)),
        work,
        float(np.quantile(works, 0.05)),
        Goodput(**parts),
        {name: math.fsum(life.counts[name] for life in lives) / len(lives) for name in COUNTS},
        mean_of([life.short / whole for life in lives]),
        min(life.least for life in lives),
        node_hours,
        cost,
        cost * (1 - useful),
    )


def with_interval(scenario: Scenario, interval: float) -> Scenario:
    """The same with another interval between files."""
    file = scenario.saves.file
    assert file is not None
    return replace(scenario, saves=replace(scenario.saves, file=replace(file, interval=interval)))


def sweep(
    vary: Callable[[float], Scenario],
    values: Iterable[float],
    runs: int,
    seed: int,
    trace: Sequence[Strike] | None = None,
) -> list[tuple[float, Forecast]]:
    """The forecast for each value of something."""
    return [(value, simulate(vary(value), runs, seed, trace)) for value in values]


def best(found: Sequence[tuple[float, Forecast]], by: Callable[[Forecast], float]) -> float:
    """The value whose forecast is the best; of equals the least."""
    return max(found, key=lambda pair: (by(pair[1]), -pair[0]))[0]
