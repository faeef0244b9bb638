"""What has happened to a run, one incident after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hpcft.report.amounts import count, short
from hpcft.report.record import Chapter
from hpcft.telemetry.beginnings import begun_at
from hpcft.telemetry.events import ANEW, ENDS, Event

Kind = Literal[
    "failure",
    "spare failure",
    "relaunch",
    "resize",
    "restart",
    "checkpoint",
    "straggler",
    "memory",
    "end",
]

#: Events of checkpoints that somebody should know of, and what they say.
_TROUBLE = {
    "save failed": "a checkpoint could not be saved",
    "damaged": "a checkpoint could not be restored",
    "unsaved": "the last step could not be saved",
    "drain failed": "a spare could not write a checkpoint for the ranks",
    "copies failed": "a checkpoint near the ranks is on no other node",
    "occupied": "another run still used the checkpoints' directory",
}

#: Events of memory that became short, and that was there again.
_MEMORY = {
    "spare cooled": "memory was short on {host}: it let go of what its script had made",
    "spare warmed": "there was memory again on {host}: it is warm",
    "copies given up": "memory was short on {host}: what it had of others' checkpoints is gone",
}


@dataclass(frozen=True)
class Incident:
    """Something that happened.

    kind: what, by kind.
    time: when; seconds since 1970.
    step: how many steps were completed.
    launch: number of the launch it happened in, from 0.
    who: rank, process and host, as far as they are concerned.
    cause: why, in the words of the log.
    then: what was done about it; empty if nothing.
    lost_steps: how many had to be done again; None if that is not known.
    stall_s: seconds from the failure to the end of the next step; None if there was none.
    """

    kind: Kind
    time: float
    step: int
    launch: int
    who: str
    cause: str
    then: str = ""
    lost_steps: int | None = None
    stall_s: float | None = None


def incidents(chapters: Sequence[Chapter]) -> list[Incident]:
    """All of a run, in order."""
    found: list[Incident] = []
    launch = -1
    for number, chapter in enumerate(chapters):
        launch += 1
        if number and chapter.events:
            first = chapter.events[0]
            step = max((event.step for event in chapters[number - 1].events), default=0)
            whence = begun_at(chapter.events)
            then = "is starting" if whence is None else f"went on from {_place(whence)}"
            lost = None if whence is None else max(0, step - whence)
            at = chapter.begun or first.time
            found.append(
                Incident("restart", at, step, launch, "", "Slurm started the job again", then, lost)
            )
        launch = _of_chapter(chapter.events, launch, found)
    return sorted(found, key=lambda incident: incident.time)


def _of_chapter(events: Sequence[Event], launch: int, found: list[Incident]) -> int:
    """Add those of a chapter; returns the number of its last launch."""
    #: Index of failures in ``found``, by epoch, in the present launch.
    failed: dict[int, list[int]] = {}
    for number, event in enumerate(events):
        detail = event.detail
        if event.kind == "failure":
            spare = detail.get("role") == "spare"
            if not spare:
                failed.setdefault(event.epoch, []).append(len(found))
            kind: Kind = "spare failure" if spare else "failure"
            cause = str(detail.get("cause") or "unknown")
            found.append(Incident(kind, event.time, event.step, launch, _who(event), cause))
        elif event.kind in ("straggler", "straggler over", "replaced"):
            _of_straggler(event, launch, found)
        elif event.kind in _MEMORY:
            found.append(
                Incident(
                    "memory",
                    event.time,
                    event.step,
                    launch,
                    _who(event) if "world" in detail else "",
                    _MEMORY[event.kind].format_map({"host": "?", **detail}),
                )
            )
        elif event.kind in ("resume", "recovered"):
            _healed(event, failed.get(event.epoch, []), found)
        elif event.kind in ANEW:
            whence = begun_at(events[number + 1 :])
            word = "started again" if event.kind == "relaunch" else "launched anew"
            whence_said = "" if whence is None else f", from {_place(whence)}"
            then = f"all ranks were {word}{whence_said}"
            lost = None if whence is None else max(0, event.step - whence)
            reason = str(detail.get("reason") or "")
            kind = "relaunch" if event.kind == "relaunch" else "resize"
            for failures in failed.values():
                for index in failures:
                    if not found[index].then and kind == "relaunch":
                        found[index] = replace(found[index], then="all ranks were started again")
            found.append(Incident(kind, event.time, event.step, launch, "", reason, then, lost))
            failed = {}
            launch += 1
        elif event.kind in _TROUBLE:
            why = str(detail.get("why") or _TROUBLE[event.kind])
            found.append(
                Incident(
                    "checkpoint", event.time, event.step, launch, "", why, _TROUBLE[event.kind]
                )
            )
        elif event.kind in ENDS:
            reason = str(detail.get("reason") or "")
            then = "finished" if event.kind == "finish" else event.kind
            found.append(Incident("end", event.time, event.step, launch, "", reason, then))
    return launch


def _who(event: Event) -> str:
    world, host = event.detail.get("world", "?"), event.detail.get("host", "?")
    if event.ranks:
        return f"rank {event.ranks[0]} (process {world} on {host})"
    return f"spare {world} on {host}"


def _of_straggler(event: Event, launch: int, found: list[Incident]) -> None:
    """It is found, or is no longer one, or has been replaced."""
    detail = event.detail
    if event.kind == "straggler":
        compute, others = (float(detail.get(key) or 0) for key in ("compute_s", "others_s"))
        cause = f"computes {short(compute)} in a step, the others {short(others)}"
        who = _who(event)
        found.append(Incident("straggler", event.time, event.step, launch, who, cause))
        return
    slow = detail.get("slow_world" if event.kind == "replaced" else "world", "?")
    then = "as fast as the others again"
    if event.kind == "replaced":
        place = f"process {detail.get('world', '?')} on {detail.get('host', '?')}"
        then = f"became a spare at step {event.step}, {place} took over"
    for index in reversed(range(len(found))):
        one = found[index]
        if one.kind == "straggler" and f"process {slow} " in one.who and one.launch == launch:
            after = f"{one.then}; {then}" if one.then else then
            found[index] = replace(one, then=after)
            break


def _healed(event: Event, indices: Sequence[int], found: list[Incident]) -> None:
    detail: dict[str, Any] = event.detail
    for index in indices:
        if event.kind == "recovered":
            found[index] = replace(found[index], stall_s=detail.get("stall_s"))
            continue
        action = str(detail.get("action", ""))
        left = count(int(detail.get("active", 0)), "rank")
        words = {
            "substitute": "a spare took over",
            "shrink": f"went on with {left}",
            "substitute+shrink": f"spares took over as far as there were any; went on with {left}",
            "none": "needed no replacement",
        }
        lost = detail.get("lost_steps")
        found[index] = replace(found[index], then=words.get(action, action), lost_steps=lost)


def _place(step: int) -> str:
    return f"step {step}" if step else "the beginning"
