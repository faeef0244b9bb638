"""What a run has left on disk, read for a report.

A run is one run directory; one that Slurm has restarted is several, a chapter each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.slurm.naming import names_before
from hpcft.telemetry import laps
from hpcft.telemetry.events import ENDS, Event
from hpcft.telemetry.laps import Lap
from hpcft.telemetry.rundir import RunDirectory

#: How many logs are looked through for a traceback, if no failure says whose to read.
_MOST_LOGS = 64


@dataclass(frozen=True)
class Chapter:
    """A run directory's part of the story.

    path: of the directory.
    begun: when the launcher began, or, where that is not known, the first event; None if there is
        neither. Seconds since 1970.
    heard: when something was last heard of it; now, if it still runs.
    events: all there are.
    """

    path: Path
    begun: float | None
    heard: float | None
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Record:
    """A run, from its first start on.

    name: what people call it.
    state: how it is: one of :data:`hpcft.watch.view.State`.
    ended: whether that is for good.
    reason: why it has ended, in the words of its summary; may be empty.
    chapters: the last is the present, the others are those before restarts by Slurm.
    step: steps completed; None if that is not known.
    exact: whether it is known when the launcher began.
    """

    name: str
    state: str
    ended: bool
    reason: str
    chapters: tuple[Chapter, ...]
    step: int | None
    exact: bool

    @property
    def rundir(self) -> RunDirectory:
        """Of the last chapter."""
        return RunDirectory(self.chapters[-1].path)


@dataclass(frozen=True)
class Status:
    """What is known of a run beyond its files.

    name, state, ended, reason, step: as of :class:`Record`.
    begun: when its launcher began; None if nobody knows. Seconds since 1970, as is ``now``.
    """

    name: str
    state: str
    ended: bool
    reason: str
    step: int | None
    begun: float | None
    now: float


def read(path: Path, status: Status) -> Record:
    """Read the run whose (last) directory is ``path``.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError: it cannot be read.
    """
    before = [path.with_name(name) for name in names_before(path.name)]
    former = [_chapter(place, None, None) for place in before if place.is_dir()]
    former = [chapter for chapter in former if chapter.events]
    live = status.now if not status.ended and status.state != "silent" else None
    last = _chapter(path, status.begun, live)
    return Record(
        status.name,
        status.state,
        status.ended,
        status.reason,
        (*former, last),
        status.step,
        status.begun is not None,
    )


def _chapter(path: Path, begun: float | None, live: float | None) -> Chapter:
    rundir = RunDirectory(path)
    events = tuple(rundir.events())
    times = [event.time for event in events]
    first = begun if begun is not None else min(times, default=None)
    heard = live
    if heard is None:
        over = any(event.kind in ENDS for event in events[-2:])
        # Whoever was killed has been heard of by its status last.
        status = None if over else rundir.status()
        heard = max([*times, *([status["time"]] if status else [])], default=None)
    if first is not None and heard is not None:
        heard = max(first, heard)
    return Chapter(path, first, heard, events)


def players(chapter: Chapter) -> Iterator[Iterator[Lap]]:
    """The laps of a chapter, process by process, so that not all have to be in memory."""
    yield from laps.by_process(RunDirectory(chapter.path).laps_folder)


def traceback(record: Record) -> tuple[int, str] | None:
    """The last traceback of who has ended a failed run: its world rank, and the text.

    That is the first of the last processes to fail which has left one. Where none of them has,
    any other's.
    """
    if record.state not in ("failed", "killed"):
        return None
    chapter, rundir = record.chapters[-1], record.rundir
    # The run's end is due to the failures of the last membership that has any.
    failures = [event for event in chapter.events if event.kind == "failure"]
    epoch = failures[-1].epoch if failures else None
    worlds = [event.detail.get("world") for event in failures if event.epoch == epoch]
    worlds += [event.detail.get("world") for event in reversed(failures)]
    logs = sorted(rundir.log_file(0).parent.glob("rank-*.log"), key=_number)
    worlds += [_number(log) for log in logs[:_MOST_LOGS]]
    for world in dict.fromkeys(worlds):
        if isinstance(world, int) and (text := rundir.last_traceback(world)):
            return world, text
    return None


def _number(log: Path) -> int:
    found = re.search(r"\d+", log.stem)
    return int(found[0]) if found else -1
