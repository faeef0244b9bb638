"""Of each rank, how long its steps take it, and how long it waits in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.report.pace import Pace
from hpcft.telemetry.laps import quantile


@dataclass(frozen=True)
class RankPace:
    """A logical rank's steps, whoever played it.

    rank: its number.
    processes: who has played it: world ranks, each with ``launch:`` before it from the second
        launch on.
    hosts: where they were, as far as that is known.
    steps: how many were done.
    p5, p25, p50, p75, p95: percentiles of the computing time of a step in seconds, to 9 %.
    waiting, saving: seconds a step, in the mean.
    slow: whether one of its processes is a straggler.
    late: how often its gradients came too late for a step.
    """

    rank: int
    processes: tuple[str, ...]
    hosts: tuple[str, ...]
    steps: int
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    waiting: float
    saving: float
    slow: bool
    late: int = 0


def rank_paces(
    paces: Sequence[Pace], hosts: dict[tuple[int, int], str], slow: set[tuple[int, int, int]]
) -> list[RankPace]:
    """Sum up by rank.

    Parameters
    ----------
    hosts: of processes, by launch and world rank.
    slow: the stragglers, by launch, world rank and rank.
    """
    by_rank: dict[int, list[Pace]] = {}
    for pace in paces:
        by_rank.setdefault(pace.rank, []).append(pace)
    made = []
    for rank, own in sorted(by_rank.items()):
        buckets: Counter[int] = Counter()
        for pace in own:
            buckets.update(pace.buckets)
        steps = sum(pace.steps for pace in own)
        who = [(pace.launch, pace.world) for pace in own]
        made.append(
            RankPace(
                rank,
                tuple(f"{launch + 1}:{world}" if launch else str(world) for launch, world in who),
                tuple(dict.fromkeys(hosts[one] for one in who if one in hosts)),
                steps,
                p5=quantile(buckets, 0.05),
                p25=quantile(buckets, 0.25),
                p50=quantile(buckets, 0.5),
                p75=quantile(buckets, 0.75),
                p95=quantile(buckets, 0.95),
                waiting=sum(pace.waiting for pace in own) / steps,
                saving=sum(pace.saving for pace in own) / steps,
                slow=any((*one, rank) in slow for one in who),
                late=sum(pace.late for pace in own),
            )
        )
    return made
