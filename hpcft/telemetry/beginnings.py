"""From where ranks go on: the begin of each launch, and of each new membership."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hpcft.telemetry.events import ANEW, Event


@dataclass(frozen=True)
class Beginning:
    """Ranks begin, or go on after a recovery.

    number: index of its event, of kind ``start`` or ``resume``.
    step: from which they go on.
    restored: when, at a start, that step was restored from a checkpoint; seconds since 1970. None
        if it was not.
    """

    number: int
    event: Event
    step: int
    restored: float | None = None

    @property
    def starts(self) -> bool:
        """Whether it is the begin of a launch."""
        return self.event.kind == "start"


def beginnings(events: Sequence[Event]) -> Iterator[Beginning]:
    """All there are, in order.

    What is restored once checkpoints are made is restored by a recovery, which says itself from
    where the ranks go on.
    """
    starting: Beginning | None = None
    for number, event in enumerate(events):
        if event.kind == "restore" and starting:
            starting = replace(starting, step=event.step, restored=event.time)
        if starting and event.kind in ("start", "restore", "resume", "checkpoint", *ANEW):
            yield starting
            starting = None
        if event.kind == "start":
            starting = Beginning(number, event, 0)
        elif event.kind == "resume":
            yield Beginning(number, event, event.step)
    if starting:
        yield starting


def size_at(events: Sequence[Event], step: int) -> int | None:
    """How many ranks made a step, by the events up to where it was restored.

    What was newer when training began anew was no good, or it would have been restored: the last
    to have begun before the step have made it.
    """
    begun = reversed(list(beginnings(events)))
    return next((int(one.event.detail["active"]) for one in begun if one.step < step), None)


def begun_at(events: Sequence[Event]) -> int | None:
    """From which step the launch went on that these events begin with; None if it has not yet."""
    first = next(beginnings(events), None)
    between = events[: first.number] if first else ()
    if first is None or not first.starts or any(event.kind in ANEW for event in between):
        return None
    return first.step
