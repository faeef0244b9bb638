"""How the ranks have spent their steps, summed up from their laps in one pass."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpcft.report.spans import Launch, Span
from hpcft.telemetry.beginnings import beginnings
from hpcft.telemetry.events import ANEW, Event
from hpcft.telemetry.laps import Lap, quantile

#: Training is looked at in about so many windows.
_WINDOWS = 400
#: Part of a window that a rank's laps must cover to be compared with others' in it.
_ENOUGH = 0.5


@dataclass(frozen=True)
class Window:
    """A part of a training span.

    kept: the last step done in it that counts; those after it were lost, and done again.
    """

    begin: float
    end: float
    launch: int
    kept: float


@dataclass
class Tally:
    """What the ranks did in a window, in seconds, all ranks together.

    counted: computing and waiting, in steps that count.
    waiting: the part of it that was waiting.
    saving: at the ends of steps that count.
    lost: in steps that were lost.
    waited: waiting in either.
    least: the least part of its time that a rank has waited, 0 to 1; infinite if no rank's laps
        cover enough of the window.
    """

    counted: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    waited: float = 0.0
    least: float = math.inf

    @property
    def seconds(self) -> float:
        return self.counted + self.saving + self.lost


@dataclass(frozen=True)
class Pace:
    """A process's pace, as one rank in one launch.

    launch, world, rank: who; the world rank is of that launch.
    steps: how many steps it has done.
    compute, waiting, saving: seconds.
    buckets: its steps by the bucket of their computing time.
    late: how often its gradients came too late.
    """

    launch: int
    world: int
    rank: int
    steps: int
    compute: float
    waiting: float
    saving: float
    buckets: Mapping[int, int]
    late: int = 0

    def quantile(self, part: float) -> float:
        """The computing time that so large a part of its steps is below, in seconds."""
        return quantile(self.buckets, part)


@dataclass(frozen=True)
class Reading:
    """What the script said of a step, as rank 0.

    counts: whether the step was not lost and done again later.
    """

    step: int
    time: float
    metrics: Mapping[str, float]
    counts: bool


@dataclass
class Laps:
    """All laps of a run, summed up.

    tallies: of each window.
    paces: of each process and rank.
    trained: of each launch from the begin of its first step to the end of its last.
    readings: what the script said, in order of time.
    """

    windows: Sequence[Window]
    tallies: list[Tally]
    paces: list[Pace] = field(default_factory=list)
    trained: dict[int, Span] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)


def windows(
    spans: Sequence[Span], chapters: Sequence[Sequence[Event]], idle: Collection[int] = ()
) -> list[Window]:
    """Cut training into windows of about the same length.

    Parameters
    ----------
    idle: launches that have made no step. They may have ended before they restored anything, and
        so it is not known from where they would have gone on.
    """
    training = [span for span in spans if span.doing == "training"]
    length = sum(span.seconds for span in training) / _WINDOWS
    returns = _returns(chapters, idle)
    made = []
    for span in training:
        # What it went back to later, at the furthest.
        kept = min((step for at, step in returns if at >= span.end), default=math.inf)
        count = max(1, math.ceil(span.seconds / length)) if length > 0 else 1
        edges = [span.begin + span.seconds * n / count for n in range(count)] + [span.end]
        made += [Window(begin, end, span.launch, kept) for begin, end in itertools.pairwise(edges)]
    return made


def _returns(chapters: Sequence[Sequence[Event]], idle: Collection[int]) -> list[tuple[float, int]]:
    """When the ranks went on from somewhere, and from which step."""
    found: list[tuple[float, int]] = []
    launch = 0
    for number, events in enumerate(chapters):
        for one in beginnings(events):
            if one.starts and launch + _anew(events[: one.number]) in idle:
                continue
            # Else it has ended before it was known from where it was to go on.
            if one.starts or one.step or one.event.detail.get("lost_steps") == 0:
                found.append((one.event.time, one.step))
        launch += 1 + _anew(events)
        if number == 0 and found:
            # Before the first start there was nothing to lose.
            found[0] = (-math.inf, found[0][1])
    return found


def _anew(events: Sequence[Event]) -> int:
    return sum(event.kind in ANEW for event in events)


def sum_up(
    processes: Iterable[tuple[int, Iterable[Lap]]],
    launches: Sequence[Launch],
    all_windows: Sequence[Window],
) -> Laps:
    """Sum up all laps.

    Parameters
    ----------
    processes: the laps of each process's file, with the index of its chapter.
    """
    made = Laps(all_windows, [Tally() for _ in all_windows])
    for chapter, process in processes:
        numbers = [n for n, launch in enumerate(launches) if launch.chapter == chapter]
        if numbers:
            _sum_process(process, launches, numbers, made)
    made.paces.sort(key=lambda pace: (pace.launch, pace.rank, pace.world))
    made.readings.sort(key=lambda reading: reading.time)
    return made


@dataclass
class _Sum:
    """Of a process as one rank in one launch."""

    steps: int = 0
    compute: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    buckets: Counter[int] = field(default_factory=Counter)
    late: int = 0


def _sum_process(
    process: Iterable[Lap], launches: Sequence[Launch], numbers: Sequence[int], made: Laps
) -> None:
    """Of one process of each launch of a chapter: those of the same number share a file."""
    sums: dict[tuple[int, int, int], _Sum] = {}
    tallies: dict[int, Tally] = {}
    begins = [window.begin for window in made.windows]
    for lap in process:
        if not _sound(lap):
            continue
        # By its middle, for clocks of nodes differ.
        middle_of_it = (lap.began + lap.ended) / 2
        launch = max((n for n in numbers if launches[n].begin <= middle_of_it), default=numbers[0])
        known = made.trained.get(launch)
        first, last = (known.begin, known.end) if known else (lap.began, lap.ended)
        made.trained[launch] = Span("training", min(first, lap.began), max(last, lap.ended), launch)
        total = sums.setdefault((launch, lap.world, lap.rank), _Sum())
        total.steps += lap.steps
        total.compute += lap.compute
        total.waiting += lap.waiting
        total.saving += lap.saving
        total.buckets.update(lap.buckets)
        total.late += lap.late
        at = max(0, bisect.bisect_right(begins, lap.began) - 1)
        if lap.rank == 0 and lap.metrics:
            kept = made.windows[at].kept if made.windows else math.inf
            made.readings.append(Reading(lap.last, lap.ended, lap.metrics, lap.last <= kept))
        while at < len(begins) and begins[at] < lap.ended:
            if made.windows[at].launch == launch:
                _add(tallies.setdefault(at, Tally()), lap, made.windows[at])
            at += 1
    for (launch, world, rank), total in sums.items():
        made.paces.append(
            Pace(
                launch,
                world,
                rank,
                total.steps,
                total.compute,
                total.waiting,
                total.saving,
                dict(total.buckets),
                total.late,
            )
        )
    for number, tally in tallies.items():
        _merge(made.tallies[number], tally, made.windows[number])


def _sound(lap: Lap) -> bool:
    """Whether it can be reckoned with; a file may have been damaged."""
    try:
        numbers = (lap.began, lap.ended, lap.compute, lap.waiting, lap.saving)
        return (
            all(0 <= number < math.inf for number in numbers)
            and lap.compute + lap.waiting + lap.saving > 0
            and lap.ended > lap.began
            and lap.steps > 0
            and isinstance(lap.rank, int)
            and isinstance(lap.world, int)
            and isinstance(lap.metrics, dict)
            and all(isinstance(n, int) and abs(n) < 1000 and c > 0 for n, c in lap.buckets.items())
        )
    except TypeError:
        return False


def _add(tally: Tally, lap: Lap, window: Window) -> None:
    """The part of a lap that is in a window; its steps are taken to be of the same length."""
    # Where its last step that counts has ended.
    done = min(max((window.kept - lap.first + 1) / (lap.last - lap.first + 1), 0.0), 1.0)
    kept_until = lap.began + done * (lap.ended - lap.began)
    counts = _common(lap.began, kept_until, window)
    lost = _common(kept_until, lap.ended, window)
    whole = lap.compute + lap.waiting + lap.saving
    tally.lost += lost
    tally.saving += counts * lap.saving / whole
    tally.counted += counts * (lap.compute + lap.waiting) / whole
    tally.waiting += counts * lap.waiting / whole
    tally.waited += (counts + lost) * lap.waiting / whole


def _common(begin: float, end: float, window: Window) -> float:
    return max(0.0, min(end, window.end) - max(begin, window.begin))


def _merge(tally: Tally, other: Tally, window: Window) -> None:
    """Add what another process did in the same window."""
    if other.seconds <= 0:
        return
    if other.seconds >= _ENOUGH * (window.end - window.begin):
        tally.least = min(tally.least, other.waited / other.seconds)
    tally.counted += other.counted
    tally.waiting += other.waiting
    tally.saving += other.saving
    tally.lost += other.lost
    tally.waited += other.waited
