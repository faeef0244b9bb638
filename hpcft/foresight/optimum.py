"""How often to save, by the closed forms; and what they say that a save and a failure cost.

Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974). Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006). Both
take failures for exponential, and every failure for one that goes back to the last checkpoint.
"""

from __future__ import annotations

import math


def young(cost: float, mtbf: float) -> float:
    """Seconds of training between saves of ``cost`` seconds, at a failure every ``mtbf``."""
    return math.sqrt(2 * cost * mtbf)


def daly(cost: float, mtbf: float) -> float:
    """The same by Daly's higher order estimate (his equation 37)."""
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def daly_goodput(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """The part of the time that goes into steps that count, by Daly's exact expected time (his
    equation 21): failures are exponential, and may also hit saves and restarts."""
    if math.isinf(mtbf):
        return interval / (interval + cost)
    expected = mtbf * math.exp(restart / mtbf) * math.expm1((interval + cost) / mtbf)
    return interval / expected
