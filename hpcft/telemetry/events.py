"""The log of a run: one JSON object a line in ``events.jsonl``."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: How a run ended, by the kind of its last event.
ENDS = {"finish": "ok", "interrupted": "interrupted", "failed": "failed"}
#: Kinds that another launch of all ranks follows.
ANEW = ("relaunch", "resize")


@dataclass(frozen=True)
class Event:
    """Something that happened to the run.

    kind: ``start``, ``failure``, ``detection``, ``adoption``, ``shrink``, ``resume``,
        ``recovered`` (the first step after a resume is done), ``relaunch`` (all ranks have ended,
        and are started again), ``resize`` (all have left, to go on as more or fewer), ``finish``,
        ``straggler`` (a process is lastingly slower than the others, with the evidence),
        ``straggler over``, ``replaced`` (it has changed places with a spare),
        ``shares`` (the batch is shared out anew, by speed),
        ``spare cooled`` (memory is short, and a spare holds no more than it has to), ``spare
        warmed``, ``copies given up`` (for the same reason, those of other nodes' checkpoints),
        ``failed`` or ``interrupted`` (asked to end, all have saved and left), ``requeue`` (whether
        Slurm starts the job again, and why not); of checkpoints ``checkpoint`` (one is committed),
        ``save failed``, ``save skipped``, ``restore``, ``damaged`` (one could not be restored),
        ``layout`` (of their files, and why), ``interval`` (from here on so often, and why),
        ``copies failed`` (one near the ranks is on no other node), ``unsaved`` (training has ended,
        and its last step could not be saved), ``occupied`` (another run still uses the directory),
        ``unlocked`` (its file system has no locks), ``evaluation`` (what one is worth on data that
        is held out), ``evaluation failed``, ``drain failed`` (a spare could not write one for the
        ranks); and ``chaos`` (`hpcft chaos` has harmed the run, or
        what it did is over).
    step: number of steps completed when it happened.
    ranks: the logical ranks concerned.
    epoch: the membership's epoch, so that nothing of a former world is taken for the present.
    time: seconds since 1970.
    detail: what else there is to say, by kind.
    """

    kind: str
    step: int
    ranks: tuple[int, ...] = ()
    epoch: int = 0
    time: float = field(default_factory=time.time)
    detail: dict[str, Any] = field(default_factory=dict)


def line(event: Event) -> str:
    """An event as a line for people: what, at which step, of which ranks, and its details."""
    when = time.strftime("%H:%M:%S", time.localtime(event.time))
    said = [f"{when} {event.kind}, step {event.step}"]
    if event.ranks:
        said.append(f"rank{'s' * (len(event.ranks) > 1)} {' '.join(map(str, event.ranks))}")
    said += [f"{name} {_value(value)}" for name, value in event.detail.items()]
    return "hpcft: " + ", ".join(said)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_value(part)}' for name, part in value.items())})"
    if isinstance(value, list):
        return " ".join(map(_value, value)) or "none"
    return "none" if value is None else str(value)


@dataclass(frozen=True)
class Echo:
    """Says events at the terminal, as they are written down.

    terminal: whether a line that is renewed in place may have to make room.
    """

    terminal: bool

    def __call__(self, event: Event) -> None:
        clear = "\r\x1b[K" if self.terminal else ""
        # At once, for others write to the same terminal.
        sys.stderr.write(f"{clear}{line(event)}\n")
        sys.stderr.flush()


def slow_now(events: Sequence[Event]) -> dict[int, Event]:
    """Who is slower than the others at the end of these events, by world rank: the evidence."""
    slow: dict[int, Event] = {}
    for event in events:
        if event.kind in ("start", *ANEW):
            slow = {}
        elif event.kind == "straggler":
            slow[event.detail["world"]] = event
        elif event.kind in ("straggler over", "failure"):
            slow.pop(event.detail["world"], None)
    return slow


def cold_now(events: Sequence[Event]) -> set[int]:
    """Which spares hold no more than they have to at the end of these events, by world rank."""
    cold: set[int] = set()
    for event in events:
        if event.kind in ("start", "relaunch", "resize"):
            cold = set()
        elif event.kind == "spare cooled":
            cold.add(event.detail["world"])
        elif event.kind in ("spare warmed", "adoption", "failure"):
            cold.discard(event.detail["world"])
    return cold


@dataclass(frozen=True)
class Times:
    """When a process failed, and when that became known; seconds since 1970."""

    failed: float
    known: float


def failure(
    step: int, epoch: int, logical: int | None, world: int, host: str, cause: str, times: Times
) -> Event:
    """The event of a process that has failed.

    Parameters
    ----------
    logical: its logical rank, None for a spare.
    world: its world rank.
    """
    return Event(
        "failure",
        step,
        () if logical is None else (logical,),
        epoch,
        times.failed,
        {
            "cause": cause,
            "detect_s": round(max(0.0, times.known - times.failed), 6),
            "role": "spare" if logical is None else "active",
            "world": world,
            "host": host,
        },
    )


def append(path: Path, events: list[Event]) -> None:
    """Add ``events`` to the log at ``path``, each as a line, all in one write.

    Raises
    ------
    OSError: they could not be written, or not all.
    """
    if not events:
        return
    lines = b"".join(json.dumps(asdict(e)).encode() + b"\n" for e in events)
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            # Whoever wrote last was killed in the middle of it.
            lines = b"\n" + lines
        if os.write(fd, lines) != len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(fd)


def read(path: Path) -> Iterator[Event]:
    """The events of a log, in order; a torn last line (its writer was killed) is left out."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            if event := _parsed(line):
                yield event


def skim(path: Path, kind: str) -> list[Event]:
    """The first event of a log, the last, and those of one kind; of a long log little is parsed."""
    found: list[Event] = []
    #: The last two lines since then; the very last may be torn.
    ends: list[str] = []
    if not path.exists():
        return found
    with path.open() as file:
        for line in file:
            event = _parsed(line) if not found or f'"{kind}"' in line else None
            if event and (not found or event.kind == kind):
                found.append(event)
                ends = []
            else:
                ends = [*ends[-1:], line]
    last = next((event for line in reversed(ends) if (event := _parsed(line))), None)
    return [*found, last] if last else found


def _parsed(text: str) -> Event | None:
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    return Event(**{**fields, "ranks": tuple(fields["ranks"])})
