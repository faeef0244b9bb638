"""How often a run may be relaunched: one budget for all of it, that refills as time goes by."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hpcft.telemetry.events import Event

#: Seconds in which a run may be relaunched as often as ``--max-relaunch`` says.
_TIME = 3600.0


def lately(events: Sequence[Event]) -> int:
    """How often the run with these events was relaunched within the time of the budget."""
    since = time.time() - _TIME
    return sum(event.kind == "relaunch" and event.time > since for event in events)


def objection(events: Sequence[Event], most: int) -> str:
    """Why a run with these events is not to be relaunched; empty if nothing is against it."""
    if not most:
        return "relaunching is off (--max-relaunch)"
    times = lately(events)
    if times < most:
        return ""
    return (
        f"relaunched {'once' if times == 1 else f'{times} times'} within an hour (--max-relaunch)"
    )


def announcement(events: Sequence[Event], most: int, ranks: int, why: str) -> str:
    """What is said when the run with these events is relaunched with so many ranks."""
    return f"hpcft: relaunching {ranks} ranks, {lately(events) + 1} of {most}: {why}"
