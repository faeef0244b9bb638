"""Ranks that are lastingly slower than the others, by what they compute and not by what they wait.

Who waits for a slow rank is its victim: in a step all are as fast as the slowest, and only the
computing time tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from hpcft.report.pace import Pace

#: Steps that a process must have done to be judged.
_STEPS = 20
#: Of a normal distribution the standard deviation, in median absolute deviations.
_SIGMA = 1.4826
#: How many standard deviations from the median are far; and how many per cent are much. Both are
#: asked for: ranks that are all alike would differ by many of no size.
_FAR, _MUCH = 3.5, 0.2
#: The least that is taken for a deviation, as a part of the median: what buckets are exact to.
_BLUR = 0.05


@dataclass(frozen=True)
class Straggler:
    """A process that has computed longer than the others of its launch in most of its steps.

    launch, world, rank: who.
    steps: how many it has done.
    median: of its computing times in a step, in seconds.
    others: the median of all ranks' medians.
    deviation: their median absolute deviation.
    score: by how many standard deviations, taken from that one, it is slower.
    waiting, others_waiting: seconds in a step waited by it, and by the median of the ranks.
    cost: seconds that a step would be shorter if it were like the others; where several are slow
        they have the same cost in common.
    """

    launch: int
    world: int
    rank: int
    steps: int
    median: float
    others: float
    deviation: float
    score: float
    waiting: float
    others_waiting: float
    cost: float


def stragglers(paces: Sequence[Pace]) -> list[Straggler]:
    """Find them, launch by launch, the slowest first.

    The median absolute deviation is not moved by the stragglers themselves, as long as they are
    not the most. Of an even number the lower median is taken, so that of two ranks the faster is
    the measure.
    """
    found: list[Straggler] = []
    for launch in sorted({pace.launch for pace in paces}):
        judged = [pace for pace in paces if pace.launch == launch and pace.steps >= _STEPS]
        if len({pace.rank for pace in judged}) < 2:
            continue
        medians = [pace.quantile(0.5) for pace in judged]
        middle = median_low(medians)
        deviation = median_low(abs(median - middle) for median in medians)
        waits = [pace.waiting / pace.steps for pace in judged]
        sigma = max(_SIGMA * deviation, _BLUR * middle)
        for pace, median in zip(judged, medians, strict=True):
            score = (median - middle) / sigma if sigma else 0.0
            if score > _FAR and median > (1 + _MUCH) * middle:
                found.append(
                    Straggler(
                        pace.launch,
                        pace.world,
                        pace.rank,
                        pace.steps,
                        median,
                        middle,
                        deviation,
                        score,
                        pace.waiting / pace.steps,
                        median_low(waits),
                        median - middle,
                    )
                )
    return sorted(found, key=lambda slow: -slow.score)
