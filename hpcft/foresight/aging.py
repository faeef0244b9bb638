"""Whether nodes fail at a constant rate, or the sooner or later after they were last seen to fail.

The time to a failure is Weibull with shape k: 1 is the exponential; below 1 a node that has just
failed fails again soon, above 1 it wears out. Times that ended without a failure are censored:
they say that it takes longer than that. With times u in units of the prior's and a rate t of u**k
that is Gamma(1, 1), t integrates out exactly, and what is left is an integral over k alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from hpcft.foresight.rates import PRIOR_FAILURES, PRIOR_HOURS, Interval

_SHAPES = np.geomspace(0.15, 6.0, 600)
#: Hours that are the least: a time of zero has no likelihood.
_LEAST = 1e-3
#: How much better one has to explain the record to be said to fit better.
_CLEARLY = 3.0


@dataclass(frozen=True)
class Aging:
    """What the times between failures say.

    shape: Weibull's.
    odds: how many times better a Weibull with unknown shape explains them than an exponential.
    verdict: which fits better, in words.
    failures, censored: how many times ended in a failure, and how many did not.
    """

    shape: Interval
    odds: float
    verdict: str
    failures: int
    censored: int


def fit(times: Sequence[tuple[float, bool]]) -> Aging:
    """Of times in hours, each with whether a failure ended it."""
    hours = np.maximum([time for time, _ in times], _LEAST) / PRIOR_HOURS
    failed = np.array([ended for _, ended in times], dtype=bool)
    count = int(failed.sum())
    logs = np.log(hours)
    # The sum of u**k over all times, for each k of the grid.
    sums = np.array([np.exp(k * logs).sum() for k in _SHAPES])
    evidence = (
        count * np.log(_SHAPES)
        + (_SHAPES - 1) * logs[failed].sum()
        + special.gammaln(PRIOR_FAILURES + count)
        - (PRIOR_FAILURES + count) * np.log1p(sums)
    )
    # Log-normal around 1, on a grid that is even in the logarithm.
    prior = np.exp(-0.5 * (np.log(_SHAPES) / 0.5) ** 2)
    prior /= prior.sum()
    top = evidence.max()
    chance = prior * np.exp(evidence - top)
    exponential = float(np.interp(0.0, np.log(_SHAPES), evidence))
    odds = float(np.exp(np.log(chance.sum()) + top - exponential))
    chance /= chance.sum()
    steps = np.cumsum(chance)
    low, high = (float(np.interp(at, steps, _SHAPES)) for at in (0.05, 0.95))
    shape = Interval(float((chance * _SHAPES).sum()), low, high)
    return Aging(shape, odds, _verdict(odds, shape, count), count, len(times) - count)


def _verdict(odds: float, shape: Interval, failures: int) -> str:
    if failures < 3:
        return "too few failures to tell a Weibull distribution from an exponential one"
    if odds > _CLEARLY:
        how = "failures come in clusters" if shape.mean < 1 else "nodes wear out"
        return f"a Weibull distribution fits better ({odds:.3g} times): {how}"
    if odds < 1 / _CLEARLY:
        return f"an exponential distribution fits better ({1 / odds:.3g} times): a constant rate"
    return "exponential and Weibull distributions fit alike; the rate is taken to be constant"
