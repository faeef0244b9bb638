"""Failure rates of nodes, with what is not known about them.

The model: each node fails at a rate of its own, and the rates of all nodes are spread around a mean
as a Gamma distribution. Of the mean and of the spread nothing is known but a wide prior; both are
integrated out over a grid. So a few nodes with few failures say little, and one that has failed
much more often than the others stands out. The same record gives the same answer every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from hpcft.telemetry.published import NODE_HOURS

#: The prior of the mean rate, a Gamma distribution: as if one failure had been seen in so many
#: node-hours. 90 % of it is from 1,600 to 91,000, which has all that is published in it.
PRIOR_FAILURES, PRIOR_HOURS = 1.0, NODE_HOURS
#: A node stands out if its rate is, with that probability, more than so many times the mean.
TIMES, SURE = 3.0, 0.95
_SAMPLES = 4000
#: The shape of the spread: at 0.2 few nodes have nearly all failures, at 100 all are alike.
_SHAPES = np.geomspace(0.2, 100.0, 40)

_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean, and where the value is with 90 % probability."""

    mean: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        """All of it, so many times."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Seen:
    """A node's record: so many failures in so many hours."""

    node: str
    failures: int
    hours: float


@dataclass(frozen=True)
class NodeRate:
    """A node's rate, in failures an hour.

    bad: with which probability it is more than :data:`TIMES` times the mean of all.
    """

    seen: Seen
    rate: Interval
    bad: float

    @property
    def stands_out(self) -> bool:
        return self.bad > SURE


@dataclass(frozen=True)
class Rates:
    """What is known after all that was seen.

    node: the mean rate of nodes such as these, in failures an hour.
    nodes: of each, worst first.
    """

    node: Interval
    nodes: tuple[NodeRate, ...]
    _mean: _Floats
    _shape: _Floats
    _own: dict[str, _Floats]

    def job(self, nodes: int, hours: float, named: Sequence[str] = ()) -> Chances:
        """What a job meets, on so many nodes such as these; ``named`` ones by their own record."""
        rng = np.random.default_rng(1)
        known = [self._own[name] for name in named if name in self._own]
        total = np.sum(known, axis=0) if known else np.zeros(_SAMPLES)
        others = nodes - len(known)
        if others > 0:
            total = total + rng.gamma(others * self._shape, self._mean / self._shape)
        return Chances(nodes, hours, total * hours)

    def raised(self, factors: dict[str, float]) -> Rates:
        """The same, with the rates of some nodes so many times as high."""
        own = {name: rates * factors.get(name, 1.0) for name, rates in self._own.items()}
        rng = np.random.default_rng(2)
        for name in factors.keys() - own.keys():
            own[name] = rng.gamma(self._shape, self._mean / self._shape) * factors[name]
        seen = {one.seen.node: one.seen for one in self.nodes}
        ranked = [
            _node(seen.get(name, Seen(name, 0, 0.0)), rates, self._mean)
            for name, rates in own.items()
        ]
        return Rates(self.node, _worst_first(ranked), self._mean, self._shape, own)


@dataclass(frozen=True)
class Chances:
    """Of a job of ``nodes`` nodes for ``hours``: Poisson, with an uncertain mean."""

    nodes: int
    hours: float
    _expected: _Floats

    @property
    def expected(self) -> Interval:
        """How many failures, in the mean."""
        return _interval(self._expected)

    def exactly(self, failures: int) -> Interval:
        """The probability of so many; the interval is what its uncertain mean leaves open."""
        return _interval(stats.poisson.pmf(failures, self._expected))

    @property
    def any_(self) -> Interval:
        """The probability of one or more."""
        return _interval(-np.expm1(-self._expected))

    @property
    def between(self) -> tuple[int, int]:
        """As many failures as these, or between them, with 90 % probability."""
        return self.at_most(0.05), self.at_most(0.95)

    def at_most(self, probability: float) -> int:
        """With this probability there are no more failures than that."""
        return int(np.quantile(self._drawn, probability))

    @cached_property
    def _drawn(self) -> NDArray[np.int64]:
        """Numbers of failures, as they may come."""
        return np.random.default_rng(3).poisson(np.minimum(self._expected, 1e9))


def estimate(seen: Sequence[Seen], pooled: Seen | None = None) -> Rates:
    """From the record of each node.

    Parameters
    ----------
    pooled: failures and hours of which nobody knows whose they were.
    """
    failures = np.array([one.failures for one in seen], dtype=float)
    hours = np.array([one.hours for one in seen], dtype=float)
    total = failures.sum() + (pooled.failures if pooled else 0)
    exposed = hours.sum() + (pooled.hours if pooled else 0.0)
    middle = (PRIOR_FAILURES + total) / (PRIOR_HOURS + exposed)
    means = middle * np.geomspace(1 / 300, 30, 300)
    shape, mean = np.meshgrid(_SHAPES, means, indexing="ij")
    # Uniform in the logarithm of the shape, and Gamma in the mean, both on a logarithmic grid.
    weight = PRIOR_FAILURES * np.log(mean) - PRIOR_HOURS * mean
    if pooled:
        weight = weight + pooled.failures * np.log(mean) - pooled.hours * mean
    # Nodes with the same record count as often as there are.
    for (k, t), count in _alike(failures, hours):
        inverse = shape / mean
        weight = weight + count * (
            special.gammaln(shape + k)
            - special.gammaln(shape)
            + shape * np.log(inverse)
            - (shape + k) * np.log(inverse + t)
        )
    chance = np.exp(weight - weight.max()).ravel()
    rng = np.random.default_rng(0)
    drawn = rng.choice(chance.size, _SAMPLES, p=chance / chance.sum())
    # Within a cell of the grid, for what is between its points.
    ratio = means[1] / means[0]
    mu = mean.ravel()[drawn] * ratio ** rng.uniform(-0.5, 0.5, _SAMPLES)
    alpha = shape.ravel()[drawn]
    own = {one.node: rng.gamma(alpha + one.failures, 1 / (alpha / mu + one.hours)) for one in seen}
    nodes = [_node(one, own[one.node], mu) for one in seen]
    return Rates(_interval(mu), _worst_first(nodes), mu, alpha, own)


def _alike(failures: _Floats, hours: _Floats) -> list[tuple[tuple[float, float], int]]:
    records, counts = np.unique(np.stack([failures, hours]), axis=1, return_counts=True)
    return [((float(k), float(t)), int(n)) for (k, t), n in zip(records.T, counts, strict=True)]


def _node(seen: Seen, rates: _Floats, means: _Floats) -> NodeRate:
    return NodeRate(seen, _interval(rates), float(np.mean(rates > TIMES * means)))


def _worst_first(nodes: Sequence[NodeRate]) -> tuple[NodeRate, ...]:
    return tuple(sorted(nodes, key=lambda one: (-one.rate.mean, one.seen.node)))


def _interval(samples: _Floats) -> Interval:
    low, high = np.quantile(samples, (0.05, 0.95))
    return Interval(float(np.mean(samples)), float(low), float(high))
