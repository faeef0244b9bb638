"""What the closed forms say that a save and a failure cost.

They take failures for exponential, and every failure for one that goes back to the last checkpoint.
"""

from __future__ import annotations

import math


def young(cost: float, mtbf: float) -> float:
    """Seconds of training between saves of ``cost`` seconds, at a failure every ``mtbf``."""
    return math.sqrt(2 * cost * mtbf)


def daly_goodput(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """The part of the time that goes into steps that count, by the exact expected time.

    It is Daly's (2006), which follows from failures that are exponential and may hit saves and
    restarts as well.
    """
    if math.isinf(mtbf):
        return interval / (interval + cost)
    expected = mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf)
    return interval / expected
