"""Who played which rank when, and what happened to whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hpcft.report.record import Chapter
from hpcft.report.spans import Span
from hpcft.telemetry.events import ANEW, ENDS, Event

Kind = Literal[
    "failure",
    "adoption",
    "shrink",
    "relaunch",
    "resize",
    "restart",
    "checkpoint",
    "save failed",
    "restore",
    "slow",
    "memory",
    "chaos",
    "end",
]

#: Marks of the same kind in a row are drawn as one if they are closer than this part of the whole.
_APART = 1 / 400
#: Marks are thinned out further until there are no more than so many.
_MOST_MARKS = 3000
_OF_RUN: dict[str, tuple[Kind, str]] = {
    "checkpoint": ("checkpoint", "checkpoint of step {step}"),
    "save failed": ("save failed", "step {step} could not be saved: {why}"),
    "interval": ("checkpoint", "{why}"),
    "restore": ("restore", "went on from step {step}, from {path}"),
    "damaged": ("save failed", "the checkpoint of step {step} is no good: {why}"),
    "unsaved": ("save failed", "the last step, {step}, could not be saved"),
    "relaunch": ("relaunch", "step {step}: all ranks were started again: {reason}"),
    "resize": ("resize", "step {step}: all ranks were launched anew: {reason}"),
    "spare cooled": ("memory", "memory was short on {host}: spare {world} is cold"),
    "spare warmed": ("memory", "there is memory again on {host}: spare {world} is warm"),
    "copies given up": ("memory", "memory was short on {host}: it gave up its copies"),
    "chaos": ("chaos", "hpcft chaos at step {step}: {order}, {who}"),
    "finish": ("end", "finished at step {step}"),
    "interrupted": ("end", "interrupted at step {step}: {reason}"),
    "failed": ("end", "failed at step {step}: {reason}"),
}


@dataclass(frozen=True)
class Stay:
    """A process plays a rank, or waits as a spare.

    launch, world, host: which process; the host is empty where it is not known.
    begin, end: seconds since 1970.
    """

    launch: int
    world: int
    host: str
    begin: float
    end: float


@dataclass(frozen=True)
class Mark:
    """Something that happened at a moment.

    count: how many of the kind it stands for.
    """

    kind: Kind
    time: float
    text: str
    count: int = 1


@dataclass
class Row:
    """What is known of a logical rank, or of a spare.

    name: ``rank 3``, or ``spare 5`` by its process.
    rank: the logical rank; None for a spare.
    """

    name: str
    rank: int | None
    stays: list[Stay] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


@dataclass
class Timeline:
    """The marks of the run as a whole, and its rows: ranks first.

    thinned: how many marks are not there by themselves, but counted in others.
    """

    run: list[Mark]
    rows: list[Row]
    thinned: int = 0


class _World:
    """The present membership of a launch, as the events tell it."""

    def __init__(self, hosts: dict[tuple[int, int], str]) -> None:
        self.rows: dict[tuple[str, int], Row] = {}
        self._hosts = hosts
        #: Of each process that lives: the row it is in, and since when.
        self._open: dict[int, tuple[tuple[str, int], float]] = {}
        self._active: list[int] = []
        self.launch = 0

    def row(self, key: tuple[str, int]) -> Row:
        name, number = key
        rank = number if name == "rank" else None
        return self.rows.setdefault(key, Row(f"{name} {number}", rank))

    def begin(self, active: int, spares: int, time: float) -> None:
        self.end(time)
        self._active = list(range(active))
        for world in self._active:
            self._enter(world, ("rank", world), time)
        for world in range(active, active + spares):
            self._enter(world, ("spare", world), time)

    def end(self, time: float) -> None:
        for world in list(self._open):
            self.leave(world, time)

    def leave(self, world: int, time: float) -> tuple[str, int] | None:
        """A process is gone; returns the row it was in."""
        if world not in self._open:
            return None
        key, since = self._open.pop(world)
        host = self._hosts.get((self.launch, world), "")
        self.row(key).stays.append(Stay(self.launch, world, host, since, max(since, time)))
        return key

    def adopt(self, logical: int, world: int, time: float) -> None:
        self.leave(world, time)
        if logical < len(self._active):
            self._active[logical] = world
        self._enter(world, ("rank", logical), time)

    def swap(self, logical: int, world: int, time: float) -> None:
        """A spare takes the place of a process that becomes a spare."""
        former = self._active[logical] if logical < len(self._active) else None
        self.adopt(logical, world, time)
        if former is not None:
            self.leave(former, time)
            self._enter(former, ("spare", former), time)

    def shrink(self, dropped: Iterable[int], time: float) -> None:
        """Those that are left are numbered anew."""
        gone = set(dropped)
        self._active = [world for n, world in enumerate(self._active) if n not in gone]
        for logical, world in enumerate(self._active):
            if world in self._open and self._open[world][0] != ("rank", logical):
                self.leave(world, time)
                self._enter(world, ("rank", logical), time)

    def _enter(self, world: int, key: tuple[str, int], time: float) -> None:
        self.row(key)
        self._open[world] = key, time


def timeline(
    chapters: Sequence[Chapter],
    spans: Sequence[Span],
    hosts: dict[tuple[int, int], str],
    slow: Iterable[tuple[int, int, int, str]] = (),
) -> Timeline:
    """Put the events of a run in rows.

    Parameters
    ----------
    hosts: of processes, by launch and world rank.
    slow: processes that were lastingly slower, by launch, world rank and rank, and what to say of
        them.
    """
    world = _World(hosts)
    made = Timeline([], [])
    for number, chapter in enumerate(chapters):
        if number:
            world.launch += 1
            at = chapter.begun or 0.0
            made.run.append(Mark("restart", at, "Slurm started the job again"))
        for event in chapter.events:
            _take(event, world, made.run)
        world.end(chapter.heard or 0.0)
    for launch, process, rank, text in slow:
        row = world.row(("rank", rank))
        for stay in row.stays:
            if (stay.launch, stay.world) == (launch, process):
                row.marks.append(Mark("slow", (stay.begin + stay.end) / 2, text))
    # Ranks first, each kind by number.
    made.rows = [world.rows[key] for key in sorted(world.rows)]
    length = spans[-1].end - spans[0].begin if spans else 0.0
    _thin(made, length)
    return made


def _take(event: Event, world: _World, run: list[Mark]) -> None:
    kind, detail = event.kind, event.detail
    if kind == "start":
        world.begin(int(detail.get("active", 0)), int(detail.get("spares", 0)), event.time)
    elif kind == "failure":
        process = detail.get("world")
        key = world.leave(process, event.time) if isinstance(process, int) else None
        key = key or (("rank", event.ranks[0]) if event.ranks else ("spare", int(process or 0)))
        cause = detail.get("cause", "")
        text = f"process {process} on {detail.get('host', '?')} failed: {cause}"
        world.row(key).marks.append(Mark("failure", event.time, f"step {event.step}: {text}"))
    elif kind == "adoption" and event.ranks and isinstance(detail.get("world"), int):
        process = detail["world"]
        world.adopt(event.ranks[0], process, event.time)
        text = f"step {event.step}: process {process} on {detail.get('host', '?')} took over"
        world.row(("rank", event.ranks[0])).marks.append(Mark("adoption", event.time, text))
    elif kind == "straggler" and event.ranks:
        factor = detail.get("factor", "?")
        text = f"process {detail.get('world')} is slow: computes {factor} times as long as others"
        key = ("rank", event.ranks[0])
        world.row(key).marks.append(Mark("slow", event.time, f"step {event.step}: {text}"))
    elif kind == "replaced" and event.ranks and isinstance(detail.get("world"), int):
        world.swap(event.ranks[0], detail["world"], event.time)
        text = (
            f"process {detail.get('slow_world', '?')} was slow and became a spare; "
            f"process {detail['world']} on {detail.get('host', '?')} took over"
        )
        key = ("rank", event.ranks[0])
        world.row(key).marks.append(Mark("adoption", event.time, f"step {event.step}: {text}"))
    elif kind == "shrink":
        world.shrink(event.ranks, event.time)
        sizes = f"from {detail.get('from', '?')} ranks to {detail.get('to', '?')}"
        for rank in event.ranks:
            text = f"step {event.step}: shrunk {sizes}; ranks are numbered anew"
            world.row(("rank", rank)).marks.append(Mark("shrink", event.time, text))
    if kind in _OF_RUN:
        mark, text = _OF_RUN[kind]
        words: defaultdict[str, object] = defaultdict(lambda: "?", detail)
        run.append(Mark(mark, event.time, text.format_map(words | {"step": event.step})))
    if kind in ANEW:
        world.end(event.time)
        world.launch += 1
    elif kind in ENDS:
        world.end(event.time)


def _thin(made: Timeline, length: float) -> None:
    """Draw marks that would cover each other as one."""
    apart = _APART * length
    lists = [made.run, *(row.marks for row in made.rows)]
    before = sum(map(len, lists))
    while True:
        for marks in lists:
            marks[:] = _joined(marks, apart)
        left = sum(map(len, lists))
        # A row has one mark of a kind at the least.
        if left <= _MOST_MARKS or apart > length:
            break
        apart *= 2
    made.thinned = before - sum(map(len, lists))


def _joined(marks: Iterable[Mark], apart: float) -> list[Mark]:
    made: list[Mark] = []
    last: dict[str, int] = {}
    for mark in sorted(marks, key=lambda mark: mark.time):
        at = last.get(mark.kind)
        if at is not None and mark.time - made[at].time < apart:
            count = made[at].count + mark.count
            first = made[at].text.partition("\n")[0]
            text = f"{first}\n... {count} of these until:\n{mark.text.rpartition(chr(10))[2]}"
            made[at] = Mark(mark.kind, made[at].time, text, count)
        else:
            last[mark.kind] = len(made)
            made.append(mark)
    return made
