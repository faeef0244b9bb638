"""A run's wall time, cut into spans in each of which the run as a whole does one thing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from hpcft.report.record import Chapter
from hpcft.telemetry.beginnings import beginnings
from hpcft.telemetry.events import ANEW, ENDS, Event

Doing = Literal["starting", "training", "recovery", "relaunch", "resize", "restart", "ending"]

#: What it does that a ``start`` ends.
_BEFORE_START = ("starting", *ANEW)


@dataclass(frozen=True)
class Span:
    """A stretch of wall time.

    doing: ``starting``: from the launcher's begin to the first step; ``training``: steps are done;
        ``recovery``: from a failure until the ranks go on; ``relaunch`` and ``resize``: from the
        failure, or from the ranks' leaving, to the first step of the next launch; ``restart``:
        between the end of one Slurm job step and the begin of the next; ``ending``: from the last
        step, or from the failure that nobody recovered from, to the end.
    begin, end: seconds since 1970.
    launch: number of the launch it belongs to, from 0, counted through all chapters.
    """

    doing: Doing
    begin: float
    end: float
    launch: int

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def cut(chapters: Sequence[Chapter]) -> list[Span]:
    """Spans that follow each other without gap or overlap, from the first begin to the last sign.

    The events' times need not be in order: nodes' clocks differ.
    """
    spans: list[Span] = []
    launch = -1
    for chapter in chapters:
        launch += 1
        if chapter.begun is None or chapter.heard is None:
            continue
        begin, end = chapter.begun, chapter.heard
        if spans:
            # A clock that was set back must not make time run backwards.
            begin = max(begin, spans[-1].end)
            end = max(end, begin)
            spans.append(Span("restart", spans[-1].end, begin, launch))
        spans += _filled(list(_interruptions(chapter.events, begin, end, launch)), begin, end)
        launch = spans[-1].launch if spans else launch
    return [span for span in spans if span.seconds > 0]


def _interruptions(
    events: Sequence[Event], begin: float, end: float, launch: int
) -> Iterator[Span]:
    """All that is not training; spans may overlap, the earlier counts."""
    doing: Doing | None = "starting"
    since = begin
    ending: float | None = None
    #: Failures nobody has recovered from yet: when, by epoch.
    failed: dict[int, float] = {}
    #: Until when a start has restored a checkpoint, which is a part of it; by the start's index.
    restored = {one.number: one.restored for one in beginnings(events) if one.restored is not None}
    for number, event in enumerate(events):
        if event.kind == "failure" and event.detail.get("role") != "spare":
            failed[event.epoch] = min(failed.get(event.epoch, event.time), event.time)
        elif event.kind == "start":
            if doing:
                started = max(event.time, restored.get(number, event.time))
                yield Span(doing, since, started, launch)
            doing, ending = None, None
            failed.clear()
        elif event.kind == "resume":
            took = float(event.detail.get("recover_s") or 0)
            first = min(failed.pop(event.epoch, event.time), event.time - took)
            failed.clear()
            if doing is None:
                yield Span("recovery", first, event.time, launch)
        elif event.kind in ANEW:
            first = min([event.time, *failed.values(), *([] if ending is None else [ending])])
            if doing:
                yield Span(doing, since, first, launch)
            doing = "relaunch" if event.kind == "relaunch" else "resize"
            since, ending = first, None
            failed.clear()
            launch += 1
        elif event.kind in ENDS:
            # Events of recoveries have the same time as what they tell of; what has failed last
            # and was not recovered from has ended the run.
            first = min([event.time, *failed.values()]) if event.kind == "failed" else event.time
            ending = first if ending is None else min(ending, first)
    if doing:
        # Never came to its training, or has not yet.
        yield Span(doing, since, end if ending is None else min(ending, end), launch)
    if ending is not None:
        yield Span("ending", ending, end, launch)
    else:
        # Names the launch of the training that goes on.
        yield Span("ending", end, end, launch)


def _filled(interruptions: list[Span], begin: float, end: float) -> Iterator[Span]:
    """Clipped so that none overlap, and training in between."""
    at = begin
    ordered = sorted(interruptions, key=lambda span: (span.launch, span.begin))
    for span in ordered:
        first = min(max(span.begin, at), end)
        last = min(max(span.end, first), end)
        # What precedes a relaunch is of the launch before.
        before = span.launch - (span.doing in ANEW)
        yield Span("training", at, first, before)
        yield replace(span, begin=first, end=last)
        at = last
    launch = ordered[-1].launch if ordered else 0
    yield Span("training", at, end, launch)


@dataclass(frozen=True)
class Launch:
    """A launch of all ranks.

    chapter: the index of the chapter it is in.
    begin: when it began; minus infinity for the first of a chapter.
    orderly: whether its ranks have left at the end of a step, all together.
    """

    chapter: int
    begin: float
    orderly: bool


def launches(chapters: Sequence[Chapter]) -> list[Launch]:
    """All launches, at the indices that :attr:`Span.launch` has."""
    found: list[Launch] = []
    for number, chapter in enumerate(chapters):
        begin, orderly = -math.inf, False
        for event in chapter.events:
            if event.kind in ANEW:
                found.append(Launch(number, begin, orderly or event.kind == "resize"))
                begin, orderly = event.time, False
            elif event.kind in ("finish", "interrupted"):
                orderly = True
        found.append(Launch(number, begin, orderly))
    return found


def trim(
    spans: Sequence[Span], all_launches: Sequence[Launch], trained: Mapping[int, Span]
) -> list[Span]:
    """Give what a launch's training has before its first step, and after its last, to others.

    The events do not tell these moments; the ranks' laps do. What comes before the first step is
    the start's. What comes after the last is the end's, or the resize's, if the ranks have ended
    in order; else nobody knows when the last one ended.

    Parameters
    ----------
    trained: of each launch from the begin of its first step to the end of its last.
    """
    made: list[Span] = []
    before: Doing = "starting"
    final = {span.launch: n for n, span in enumerate(spans) if span.doing == "training"}
    for number, span in enumerate(spans):
        if span.doing in (*_BEFORE_START, "restart"):
            before = "starting" if span.doing == "restart" else span.doing
        if span.doing != "training" or span.launch not in trained:
            made.append(span)
            continue
        steps = trained[span.launch]
        first, last = min(max(steps.begin, span.begin), span.end), span.end
        if all_launches[span.launch].orderly and final[span.launch] == number:
            last = min(max(steps.end, first), span.end)
        resized = number + 1 < len(spans) and spans[number + 1].doing == "resize"
        made.append(replace(span, doing=before, end=first))
        made.append(replace(span, begin=first, end=last))
        made.append(replace(span, doing="resize" if resized else "ending", begin=last))
    joined: list[Span] = []
    for span in made:
        if span.seconds <= 0:
            continue
        if joined and (joined[-1].doing, joined[-1].launch) == (span.doing, span.launch):
            joined[-1] = replace(joined[-1], end=span.end)
        else:
            joined.append(span)
    return joined
