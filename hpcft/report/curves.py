"""What the script said of its steps, as curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpcft.ckpt.evaluated import PREFIX
from hpcft.report.pace import Reading
from hpcft.telemetry.events import Event

#: A curve is drawn with about so many points, and so many curves are shown.
_POINTS, MOST = 600, 24


@dataclass(frozen=True)
class Point:
    """A value after a step.

    counts: whether the step was not lost and done again later.
    """

    step: int
    time: float
    value: float
    counts: bool


@dataclass(frozen=True)
class Curve:
    """A metric as rank 0 has given it to ``state.commit``, at the last step of each of its laps;
    or, called ``validation/<name>``, as spares have found it of checkpoints.

    known: how many values there are; of each of about 600 stretches those with the least and the
        greatest are kept.
    """

    name: str
    points: tuple[Point, ...]
    known: int


def validation(events: Iterable[Event]) -> list[Reading]:
    """What spares have found of checkpoints, by step.

    Of a step that was done again, and evaluated again, what was found first does not count.
    """
    found = [event for event in events if event.kind == "evaluation"]
    found.sort(key=lambda event: (event.step, event.time))
    last = {event.step: event for event in found}
    return [
        Reading(
            event.step,
            event.time,
            {PREFIX + name: value for name, value in event.detail["metrics"].items()},
            event is last[event.step],
        )
        for event in found
    ]


def curves(readings: Sequence[Reading]) -> list[Curve]:
    """Of all metrics, losses first, then by name."""
    points: dict[str, list[Point]] = {}
    for reading in readings:
        for name, value in reading.metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                point = Point(reading.step, reading.time, float(value), reading.counts)
                points.setdefault(name, []).append(point)
    names = sorted(points, key=lambda name: ("loss" not in name.lower(), name))
    return [Curve(name, tuple(_thinned(points[name])), len(points[name])) for name in names]


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _POINTS)
    kept: list[Point] = []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        extremes = (min(part, key=_value), max(part, key=_value))
        kept += sorted(set(extremes), key=lambda point: point.time)
    return kept


def _value(point: Point) -> float:
    return point.value
