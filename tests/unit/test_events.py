"""What the log of events says of the ranks."""

from __future__ import annotations

import pytest

from hpcft.telemetry.events import Event, size_at


def start(active: int) -> Event:
    return Event("start", 0, detail={"active": active})


def resume(step: int, active: int) -> Event:
    return Event("resume", step, detail={"active": active})


def at(kind: str, step: int) -> Event:
    return Event(kind, step)


FIRST = [start(4), at("checkpoint", 5), resume(8, 3), at("checkpoint", 10)]
SECOND = [at("relaunch", 12), start(2), at("damaged", 10), at("restore", 5), at("checkpoint", 10)]


@pytest.mark.parametrize(
    ("events", "step", "size"),
    [
        ([], 5, None),
        ([start(4)], 0, None),
        (FIRST, 5, 4),
        (FIRST, 8, 4),
        (FIRST, 9, 3),
        # The first launch's step 10 was no good: what is there is the second's.
        ([*FIRST, *SECOND], 10, 2),
        ([*FIRST, *SECOND], 5, 4),
        ([*FIRST, *SECOND, at("restore", 10), resume(10, 1)], 10, 2),
        ([*FIRST, *SECOND, at("restore", 10), resume(10, 1)], 15, 1),
    ],
)
def test_how_many_ranks_made_a_step(events: list[Event], step: int, size: int | None) -> None:
    assert size_at(events, step) == size
