"""All that is told of a run: what the page draws and ``--json`` prints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcft import __version__
from hpcft.report import record as records
from hpcft.report.amounts import short
from hpcft.report.curves import MOST, Curve, curves, validation
from hpcft.report.goodput import Goodput, goodput
from hpcft.report.incidents import Incident, incidents
from hpcft.report.pace import Laps, sum_up, windows
from hpcft.report.ranks import RankPace, rank_paces
from hpcft.report.record import Record, Status
from hpcft.report.spans import Span, cut, launches, trim
from hpcft.report.stragglers import Straggler, stragglers
from hpcft.report.timeline import Timeline, timeline
from hpcft.report.words import Facts, advice, told
from hpcft.telemetry.beginnings import beginnings
from hpcft.telemetry.events import ANEW
from hpcft.telemetry.laps import Lap

#: Incidents that are told; of more the first and the last.
_MOST_INCIDENTS = 400


@dataclass(frozen=True)
class Traceback:
    """The last of who ended the run.

    world: its world rank.
    """

    world: int
    text: str


@dataclass(frozen=True)
class Story:
    """A run, told.

    name, run_dir, state: as ``hpcft ps`` has them.
    ended: whether it has.
    version: of hpcft, which tells this.
    made: when; seconds since 1970.
    begun, heard: from when to when it is told; None if nothing is known of it.
    step: steps completed.
    words: what happened, how it ended and what it cost, a sentence each.
    look_at: what to look at, a sentence each.
    goodput: where its time went.
    spans: its wall time, one after the other.
    incidents: what happened to it.
    timeline: who played which rank, and what happened to whom.
    curves: what the script said of its steps.
    ranks: how fast each was.
    stragglers: processes that were lastingly slower than the others.
    traceback: of a failed run; None if there is none.
    notes: what is missing or was thinned out, a sentence each.
    """

    name: str
    run_dir: str
    state: str
    ended: bool
    version: str
    made: float
    begun: float | None
    heard: float | None
    step: int | None
    words: tuple[str, ...]
    look_at: tuple[str, ...]
    goodput: Goodput
    spans: tuple[Span, ...]
    incidents: tuple[Incident, ...]
    timeline: Timeline
    curves: tuple[Curve, ...]
    ranks: tuple[RankPace, ...]
    stragglers: tuple[Straggler, ...]
    traceback: Traceback | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        fields = asdict(self)
        fields["goodput"]["part"] = self.goodput.part
        return fields


def tell(path: Path, status: Status) -> Story:
    """Tell the story of the run whose (last) directory is ``path``.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError: it cannot be read.
    """
    return of_record(records.read(path, status))


def of_record(record: Record) -> Story:
    """Tell the story of a run that has been read."""
    chapters = record.chapters
    all_launches = launches(chapters)
    rough = cut(chapters)
    events = [chapter.events for chapter in chapters]
    laps = sum_up(_processes(record), all_launches, windows(rough, events))
    idle = set(range(len(all_launches))) - laps.trained.keys()
    if idle and laps.trained:
        laps = sum_up(_processes(record), all_launches, windows(rough, events, idle))
    spans = trim(rough, all_launches, laps.trained)
    slow = stragglers(laps.paces)
    hosts = _hosts(record)
    lines = timeline(
        chapters,
        spans,
        hosts,
        [
            (
                one.launch,
                one.world,
                one.rank,
                f"slower: computes {short(one.median)} in a step, others {short(one.others)}",
            )
            for one in slow
        ],
    )
    happened = incidents(chapters)
    where = goodput(spans, laps)
    found = records.traceback(record)
    facts = _facts(record, where, happened, slow)
    evaluations = validation(event for chapter in chapters for event in chapter.events)
    all_curves = curves([*laps.readings, *evaluations])
    marked = {(one.launch, one.world, one.rank) for one in slow}
    return Story(
        name=record.name,
        run_dir=str(record.rundir.path),
        state=record.state,
        ended=record.ended,
        version=__version__,
        made=time.time(),
        begun=spans[0].begin if spans else None,
        heard=spans[-1].end if spans else None,
        step=record.step,
        words=tuple(told(facts)),
        look_at=tuple(advice(facts, found is not None)),
        goodput=where,
        spans=tuple(spans),
        incidents=tuple(_few(happened)),
        timeline=lines,
        curves=tuple(all_curves[:MOST]),
        ranks=tuple(rank_paces(laps.paces, hosts, marked)),
        stragglers=tuple(slow),
        traceback=Traceback(*found) if found else None,
        notes=tuple(_notes(record, where, happened, lines, all_curves, laps)),
    )


def _processes(record: Record) -> Iterator[tuple[int, Iterator[Lap]]]:
    for number, chapter in enumerate(record.chapters):
        for process in records.players(chapter):
            yield number, process


def _few(happened: list[Incident]) -> list[Incident]:
    if len(happened) <= _MOST_INCIDENTS:
        return happened
    half = _MOST_INCIDENTS // 2
    return happened[:half] + happened[-half:]


def _hosts(record: Record) -> dict[tuple[int, int], str]:
    """Where processes were, by launch and world rank, as far as that is known."""
    hosts: dict[tuple[int, int], str] = {}
    launch = -1
    for chapter in record.chapters:
        launch += 1
        for event in chapter.events:
            if event.kind in ANEW:
                launch += 1
            world, host = event.detail.get("world"), event.detail.get("host")
            if isinstance(world, int) and host:
                hosts[launch, world] = str(host)
    # Who is in the table now; those who have failed are in the events.
    for entry in record.rundir.ranks():
        hosts.setdefault((launch, entry["world"]), str(entry["host"]))
    return hosts


def _facts(
    record: Record, where: Goodput, happened: list[Incident], slow: list[Straggler]
) -> Facts:
    events = [event for chapter in record.chapters for event in chapter.events]
    starts = [event for event in events if event.kind == "start"]
    sizes = [event.detail.get("active") for event in events if event.kind in ("start", "resume")]
    first = next(beginnings(events), None)
    restored = first.step if first and first.restored is not None else None
    saved = [event.step for event in events if event.kind == "checkpoint"]
    chosen = {
        e.detail.get("tier"): str(e.detail.get("why")) for e in events if e.kind == "interval"
    }
    # Of the first chapter there is: those after it are told as incidents.
    restarts = starts[-1].detail.get("restarts", 0) if starts else 0
    return Facts(
        record.state,
        record.ended,
        record.reason,
        record.step,
        sizes[0] if sizes else None,
        sizes[-1] if sizes else None,
        starts[0].detail.get("spares", 0) if starts else 0,
        restored,
        restarts,
        saved[-1] if saved else None,
        where,
        happened,
        slow,
        tuple(chosen.values()),
    )


def _notes(
    record: Record,
    where: Goodput,
    happened: Sequence[Incident],
    lines: Timeline,
    all_curves: Sequence[Curve],
    laps: Laps,
) -> Iterator[str]:
    trained = any(span.doing == "training" for span in cut(record.chapters))
    if not record.exact and record.chapters[0].events:
        yield (
            "When the launcher began is not known any more: the time is counted from the first "
            "event on."
        )
    if trained and not laps.paces:
        yield (
            "The ranks have left no laps: all of the training is taken for steps that count, and "
            "nothing can be said of the ranks' pace. A rank writes laps when it has trained for a "
            "quarter of a second."
        )
    elif trained and where.measured < 0.9:
        yield (
            f"The ranks' laps tell of {100 * where.measured:.0f} % of the training; the rest is "
            "divided as they are."
        )
    if len(happened) > _MOST_INCIDENTS:
        yield (
            f"Of {len(happened)} incidents the first and the last {_MOST_INCIDENTS // 2} are "
            "listed; events.jsonl has all."
        )
    if lines.thinned:
        yield (
            f"{lines.thinned} marks of the timeline are counted in others of their kind that are "
            "too near to be drawn beside them."
        )
    if len(all_curves) > MOST:
        yield f"Of {len(all_curves)} metrics {MOST} are shown."
    thinned = [curve for curve in all_curves if len(curve.points) < curve.known]
    if thinned:
        most = max(curve.known for curve in thinned)
        yield f"Curves are drawn with the extremes of some {most} values."
