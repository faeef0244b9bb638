"""How often to save: what costs least, by what a save costs and how often one is needed.

Saving every t seconds costs C / t of the time, and a failure that comes every M seconds, and goes
back to the last save, t / 2 each: least is lost with t = sqrt(2 C M) (Young, "A first order
approximation to the optimum checkpoint interval", CACM 17, 1974). Daly ("A higher order estimate of
the optimum checkpoint interval for restart dumps", FGCS 22, 2006) has the terms that follow where C
is not small beside M. What a restart costs plays no part in it: it is paid a failure, however often
one saves.

With several tiers a failure goes back to the nearest that has survived it. To first order each tier
has an optimum of its own, by its own cost and by the rate of those failures alone that need it (Di,
Bouguerra, Bautista-Gomez and Cappello, IPDPS 2014; Benoit et al. 2017; both from memory); hence one
formula serves all of them. Saves in the background make C small, and what they take until they are
committed does not change t: that is lost with every failure.

The rate is estimated. Before anything has been seen it is what others have published, and the more
of the run's own nodes has been seen, the less that counts: the mean of a gamma distribution, which
is conjugate to the number of failures in so many node-hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcft.telemetry.published import NODE_HOURS

#: Failures a second of one node, before anything is known.
PRIOR_RATE = 1 / (NODE_HOURS * 3600)
#: What has been seen outweighs that from here on: node-seconds. That is little, for what is seen
#: is of the very nodes and the very training that the interval is for.
PRIOR_WEIGHT = 86400.0
#: Of the failures that come to a tier, those that it cannot heal. Moody et al., SC10, say of SCR's
#: checkpoints on the nodes that they were effective against 85 % of the failures of their systems.
PAST_A_TIER = 0.15

#: At most this part of the time goes into the saves of one tier.
_MOST_SAVING = 0.1
#: A save is through before the next begins, by this factor.
_ROOM = 1.25
#: Less is not to be measured, and no save costs nothing; seconds.
_LEAST_COST = 1e-3
#: An interval that is less than this factor from the best is left as it is.
_HYSTERESIS = 1.2


def optimum(cost: float, mtbf: float) -> float:
    """Seconds from the end of a save to the begin of the next that lose least (Daly 2006).

    Parameters
    ----------
    cost: seconds that training loses by a save.
    mtbf: seconds between two failures that need it.
    """
    if cost >= 2 * mtbf:
        return mtbf
    ratio = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def waste(every: float, cost: float, mtbf: float) -> float:
    """The part of the time that is lost to first order, restarts left aside."""
    return cost / every + every / (2 * mtbf)


def rate(failures: int, node_seconds: float, nearer: int) -> float:
    """Failures a second of one node that need a tier.

    Parameters
    ----------
    failures: that have needed it.
    node_seconds: in which they came.
    nearer: how many ways there are to heal a failure without this tier.
    """
    expected = PRIOR_RATE * PAST_A_TIER**nearer * PRIOR_WEIGHT
    return (expected + failures) / (PRIOR_WEIGHT + node_seconds)


@dataclass(frozen=True)
class Interval:
    """How often to save.

    seconds: from the begin of a save to that of the next.
    bound: why that is not the optimum; empty if it is.
    """

    seconds: float
    bound: str = ""


def best(cost: float, drain: float, mtbf: float, longest: float) -> Interval:
    """What costs least, within bounds.

    Parameters
    ----------
    cost, mtbf: as for :func:`optimum`.
    drain: seconds from the begin of a save to its end.
    longest: seconds that the user wants to lose at most.
    """
    cost = max(cost, _LEAST_COST)
    found = Interval(optimum(cost, mtbf) + cost)
    if found.seconds > longest:
        found = Interval(longest, "as rarely as is allowed")
    for seconds, why in (
        (cost / _MOST_SAVING, f"so that saving takes no more than {100 * _MOST_SAVING:.0f} %"),
        (drain * _ROOM, f"for a save is under way for {drain:.3g} s"),
    ):
        if found.seconds < seconds:
            found = Interval(seconds, why)
    return found


def notable(before: float, after: float) -> bool:
    """Whether it is worth while to save every ``after`` seconds, and not every ``before``."""
    return max(before, after) > _HYSTERESIS * min(before, after)
