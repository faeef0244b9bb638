"""How many nodes of an allocation to keep as spares."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hpcft.foresight import forecast
from hpcft.foresight.scenario import DAY, HOUR, Hazards, Machine, Saves, Scenario, Site, Stack
from hpcft.report.amounts import duration

#: Of a job that is requeued so much is played through.
_CAMPAIGN = 30 * DAY
#: Lives for each number of spares, and after how many that are worse no more are tried.
_LIVES, _WORSE = 64, 3


@dataclass(frozen=True)
class Provision:
    """What is best for the nodes that there are.

    spares: nodes of them that wait.
    part: the useful part of all node-hours with these, spares included.
    why: in words.
    """

    spares: int
    part: float
    why: str


def provision(
    nodes: int,
    ranks_per_node: int,
    limit: float,
    requeued: bool,
    between: float,
    at_least: int = 1,
    shrinks: bool = True,
) -> Provision:
    """Find out how many spares make the most of an allocation, in simulation.

    A spare costs its node's work as long as nothing fails. What it saves is the work of a failed
    node until that is back, or, where fewer nodes cannot go on, that of all of them.

    Parameters
    ----------
    nodes: all there are.
    limit: on a job's time, in seconds.
    requeued: saves, and goes on in another job; else one job is all.
    between: failures of one node, mean time in seconds.
    at_least: with fewer nodes it does not train.
    shrinks: goes on with fewer nodes where there is no spare.
    """
    whole = Scenario(
        Machine(nodes, ranks_per_node=ranks_per_node),
        max(limit, _CAMPAIGN) if requeued else limit,
        Hazards(node=between),
        Saves() if requeued else Saves(file=None),
        Stack(
            start=min(Stack().start, limit / 10),
            short="shrink" if shrinks else "requeue",
            at_least=at_least,
        ),
        Site(limit=limit if requeued else math.inf),
    )
    tried: list[tuple[float, forecast.Forecast]] = []
    for spares in range(nodes - at_least + 1):
        machine = replace(whole.machine, nodes=nodes - spares, spares=spares)
        tried.append((spares, forecast.simulate(replace(whole, machine=machine), _LIVES)))
        if spares - forecast.best(tried, _useful) >= _WORSE:
            break
    best = int(forecast.best(tried, _useful))
    part = _useful(tried[best][1])
    why = f"a node fails once in {duration(between)}, {_chance(nodes, limit, between)}"
    if best + 1 < len(tried):
        less = 100 * (part - _useful(tried[best + 1][1]))
        why += f"; with one more spare node {less:.1f} % less is done"
    return Provision(best, part, why)


def _useful(found: forecast.Forecast) -> float:
    return found.yield_


def _chance(nodes: int, limit: float, between: float) -> str:
    expected = nodes * limit / between
    return f"{expected:.2g} of {nodes} in {limit / HOUR:g} hours"
