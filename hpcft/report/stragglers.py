"""Ranks that are lastingly slower than the others, by what they compute and not by what they wait.

Who waits for a slow rank is its victim: in a step all are as fast as the slowest, and only the
computing time tells them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from hpcft.report.pace import Pace
from hpcft.telemetry.outliers import compare

#: Steps that a process must have done to be judged.
_STEPS = 20


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
    """Find them, launch by launch, the slowest first."""
    found: list[Straggler] = []
    for launch in sorted({pace.launch for pace in paces}):
        judged = [pace for pace in paces if pace.launch == launch and pace.steps >= _STEPS]
        if len({pace.rank for pace in judged}) < 2:
            continue
        standings = compare({n: pace.quantile(0.5) for n, pace in enumerate(judged)})
        waits = median_low(pace.waiting / pace.steps for pace in judged)
        for pace, standing in zip(judged, standings.values(), strict=True):
            if standing.far:
                found.append(
                    Straggler(
                        pace.launch,
                        pace.world,
                        pace.rank,
                        pace.steps,
                        standing.value,
                        standing.others,
                        standing.deviation,
                        standing.score,
                        pace.waiting / pace.steps,
                        waits,
                        standing.value - standing.others,
                    )
                )
    return sorted(found, key=lambda slow: -slow.score)
