"""Where things go in the page's pictures: plain geometry, which the template turns into SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.report.amounts import duration, short
from hpcft.report.curves import Curve, Point
from hpcft.report.incidents import Incident
from hpcft.report.ranks import RankPace
from hpcft.report.spans import Span
from hpcft.report.timeline import Mark, Row, Timeline

#: Of all pictures, in units of about a pixel: width, the column of labels, room at the right.
WIDTH, LABELS, RIGHT = 1100, 110, 20
#: The most rows of a picture.
MOST_ROWS = 48
_ROW = 24
#: The least width of what has happened, however short it was.
_LEAST = 2.0
_MOST_TEXT = 300


@dataclass(frozen=True)
class Scale:
    """Takes values from ``first`` to ``last`` to places from ``begin`` to ``end``."""

    first: float
    last: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        first, last = self.first, self.last
        if self.log:
            first, last, value = math.log10(first), math.log10(last), math.log10(value)
        part = (value - first) / (last - first) if last > first else 0.0
        return round(self.begin + min(max(part, 0.0), 1.0) * (self.end - self.begin), 1)


@dataclass(frozen=True)
class Tick:
    """A place on an axis, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; ``kind`` says what it looks like, ``tip`` what it says when pointed at."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    tip: str


@dataclass(frozen=True)
class Glyph:
    """A mark of some kind, around a place."""

    kind: str
    x: float
    y: float
    tip: str
    count: int = 1


@dataclass(frozen=True)
class Label:
    """A row's name."""

    y: float
    text: str
    slow: bool = False


@dataclass(frozen=True)
class Lanes:
    """The timeline.

    kinds: of glyphs that are in it, for the legend; ``doings`` of bars.
    hidden: how many rows are not drawn.
    """

    height: float
    ticks: Sequence[Tick]
    bands: Sequence[Bar]
    bars: Sequence[Bar]
    glyphs: Sequence[Glyph]
    labels: Sequence[Label]
    doings: Sequence[str]
    kinds: Sequence[str]
    hidden: int


@dataclass(frozen=True)
class Plot:
    """A curve.

    kept, lost: SVG paths of what counts, and of what was done again.
    points: place, step and value of each point, for who points at it.
    """

    name: str
    height: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    kept: str
    lost: str
    points: Sequence[tuple[float, float, int, str]]
    glyphs: Sequence[Glyph]
    log: bool


@dataclass(frozen=True)
class Box:
    """A rank's computing times: whisker, box and median, and its waiting beside them."""

    y: float
    label: str
    slow: bool
    low: float
    left: float
    middle: float
    right: float
    high: float
    wait: float
    wait_text: str
    tip: str


@dataclass(frozen=True)
class Boxes:
    """Ranks' computing times.

    split: where the column of waiting begins.
    dots: a path with a dot for each rank's median, where not all have a box; else empty.
    slow_dots: those of stragglers.
    """

    height: float
    ticks: Sequence[Tick]
    wait_ticks: Sequence[Tick]
    rows: Sequence[Box]
    split: float
    hidden: int
    dots: str
    slow_dots: Sequence[Glyph]
    dot_ticks: Sequence[Tick]


def cut_short(text: str) -> str:
    """What somebody else has written, so that it fits."""
    return text if len(text) <= _MOST_TEXT else text[: _MOST_TEXT - 4] + " ..."


def nice(first: float, last: float, about: int = 6) -> list[float]:
    """Round numbers between two, about so many."""
    if not last > first:
        return [first]
    rough = (last - first) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((f * power for f in (1, 2, 5, 10) if f * power >= rough), 10 * power)
    count = math.floor((last - first) / step * (1 + 1e-9)) + 2
    begin = math.ceil(first / step - 1e-9)
    values = (round((begin + n) * step, 12) for n in range(count))
    return [value for value in values if first - 1e-6 * step <= value <= last + 1e-6 * step]


def _nice_time(seconds: float) -> list[float]:
    """Round times from 0 on."""
    steps = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 21600, 43200)
    if seconds < 6:
        return nice(0, seconds)
    step = next((s for s in steps if seconds / s <= 9), 86400 * math.ceil(seconds / 86400 / 8))
    return [float(n * step) for n in range(math.floor(seconds / step) + 1)]


def _since(seconds: float) -> str:
    return "0" if not seconds else duration(seconds).removesuffix(" 0 s").removesuffix(" 0 min")


def lanes(
    spans: Sequence[Span], timeline: Timeline, slow: Iterable[int], title: dict[str, str]
) -> Lanes:
    """Draw the timeline.

    Parameters
    ----------
    slow: stragglers' ranks.
    title: of doings.
    """
    begin, end = spans[0].begin, spans[-1].end
    x = Scale(begin, end, LABELS, WIDTH - RIGHT)
    rows, hidden = _chosen(timeline.rows)
    top = 30.0
    run_y = top + 6
    rows_y = run_y + 50
    height = rows_y + len(rows) * _ROW + 8
    bars, bands, glyphs = [], [], []
    for span in spans:
        left, width = x(span.begin), max(x(span.end) - x(span.begin), _LEAST)
        tip = (
            f"{title[span.doing]}: {duration(span.seconds)}, from {_since(span.begin - begin)} on, "
            f"launch {span.launch + 1}"
        )
        bars.append(Bar(span.doing, left, run_y, width, 18, tip))
        if span.doing != "training" and rows:
            bands.append(Bar(span.doing, left, rows_y - 4, width, height - rows_y, tip))
    glyphs += [_glyph(mark, x, run_y + 32) for mark in timeline.run]
    labels = [Label(run_y + 13, "run")]
    if timeline.run:
        labels.append(Label(run_y + 36, "its events"))
    slow = set(slow)
    for number, row in enumerate(rows):
        y = rows_y + number * _ROW
        labels.append(Label(y + 13, row.name, row.rank is not None and row.rank in slow))
        for n, stay in enumerate(row.stays):
            kind = "spare" if row.rank is None else ("played", "played other")[n % 2]
            host = f" on {stay.host}" if stay.host else ""
            what = "waits as a spare" if row.rank is None else f"plays {row.name}"
            tip = (
                f"process {stay.world}{host} {what}, launch {stay.launch + 1}: "
                f"{duration(stay.end - stay.begin)}"
            )
            width = max(x(stay.end) - x(stay.begin), _LEAST)
            bars.append(Bar(kind, x(stay.begin), y + 4, width, _ROW - 10, tip))
        glyphs += [_glyph(mark, x, y + _ROW / 2 - 1) for mark in row.marks]
    return Lanes(
        height,
        [Tick(x(begin + t), _since(t)) for t in _nice_time(end - begin)],
        bands,
        bars,
        glyphs,
        labels,
        list(dict.fromkeys(span.doing for span in spans)),
        sorted({glyph.kind for glyph in glyphs}),
        hidden,
    )


def _chosen(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Those to which something happened, and of the others as many as there is room for."""

    def unusual(number: int) -> tuple[bool, bool, int]:
        kinds = {mark.kind for mark in rows[number].marks}
        return "slow" not in kinds, not kinds, number

    order = sorted(range(len(rows)), key=unusual)[:MOST_ROWS]
    return [rows[n] for n in sorted(order)], len(rows) - len(order)


def _glyph(mark: Mark, x: Scale, y: float) -> Glyph:
    # Beside the failure that it answers, and not on top of it.
    aside = 11 if mark.kind in ("adoption", "shrink", "restore") else 0
    return Glyph(mark.kind, x(mark.time) + aside, y, cut_short(mark.text), mark.count)


def plot(curve: Curve, incidents: Sequence[Incident]) -> Plot:
    """Draw a curve over the steps, and what happened on it."""
    points = curve.points
    values = [point.value for point in points]
    low, high = min(values), max(values)
    log = low > 0 and high > 100 * low
    if not log:
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    height = 300.0
    top, bottom = 28.0, height - 34
    first, last = min(p.step for p in points), max(p.step for p in points)
    x = Scale(min(first, 0) if first < 0.1 * last else first, last, LABELS, WIDTH - RIGHT)
    y = Scale(low, high, bottom, top, log)
    if log:
        exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        every = max(1, len(exponents) // 6)
        y_values = [10.0**n for n in exponents][::every]
    else:
        y_values = nice(low, high, 5)
    glyphs = []
    kinds = {
        "failure": "failure",
        "relaunch": "relaunch",
        "resize": "resize",
        "restart": "restart",
    }
    at: dict[tuple[str, int], Glyph] = {}
    for one in incidents:
        if one.kind not in kinds or not x.first <= one.step <= x.last:
            continue
        key = one.kind, round(x(one.step) / 5)
        who = f"{one.who}: " if one.who else ""
        then = f"; {one.then}" if one.then else ""
        tip = cut_short(f"step {one.step}: {who}{one.cause}{then}")
        if known := at.get(key):
            at[key] = Glyph(known.kind, known.x, known.y, known.tip, known.count + 1)
        else:
            at[key] = Glyph(kinds[one.kind], x(one.step), 14, tip)
    glyphs = [
        Glyph(g.kind, g.x, g.y, g.tip + (f"\n... {g.count} of these here" * (g.count > 1)), g.count)
        for g in list(at.values())[:200]
    ]
    return Plot(
        curve.name,
        height,
        [Tick(x(step), f"{step:g}") for step in nice(x.first, x.last, 8) if step == int(step)],
        [Tick(y(value), f"{value:.4g}") for value in y_values],
        _path(points, x, y, True),
        _path(points, x, y, False),
        [(x(p.step), y(p.value), p.step, f"{p.value:.6g}") for p in points],
        glyphs,
        log,
    )


def _path(points: Sequence[Point], x: Scale, y: Scale, counts: bool) -> str:
    """Of the points that count, or of those that do not, each with the line that leads to it."""
    parts: list[str] = []
    last: Point | None = None
    for point in points:
        place = f"{x(point.step)},{y(point.value)}"
        if point.counts == counts:
            # After the ranks went back a new line begins.
            joined = last is not None and last.step < point.step
            if not joined:
                parts.append(f"M{place}h.1")
            elif parts and last is not None and last.counts == counts:
                parts.append(f"L{place}")
            else:
                assert last is not None
                parts.append(f"M{x(last.step)},{y(last.value)}L{place}")
        last = point
    return "".join(parts)


def boxes(ranks: Sequence[RankPace]) -> Boxes:
    """Draw the ranks' paces."""
    shown, hidden = _chosen_ranks(ranks)
    split = WIDTH - 300.0
    most = max(rank.p95 for rank in shown) * 1.05
    longest = max((rank.waiting for rank in shown), default=0.0) * 1.15 or 1e-6
    x = Scale(0, most, LABELS, split - 40)
    wait = Scale(0, longest, 0, WIDTH - RIGHT - split - 70)
    top = 44.0
    rows = []
    for number, rank in enumerate(shown):
        hosts = f" on {', '.join(rank.hosts[:3])}" if rank.hosts else ""
        processes = ", ".join(rank.processes[:6])
        low, high = short(rank.p25), short(rank.p75)
        tip = (
            f"rank {rank.rank} (process {processes}{hosts}), {rank.steps} steps\n"
            f"computes {short(rank.p50)} in the median, half of the steps from {low} to {high}, "
            f"nine of ten from {short(rank.p5)} to {short(rank.p95)}\n"
            f"waits {short(rank.waiting)} and saves {short(rank.saving)} a step, in the mean"
            + f"\nits gradients came too late {rank.late} times"
            * bool(rank.late)
        )
        rows.append(
            Box(
                top + number * _ROW,
                f"rank {rank.rank}",
                rank.slow,
                x(rank.p5),
                x(rank.p25),
                x(rank.p50),
                x(rank.p75),
                x(rank.p95),
                wait(rank.waiting),
                short(rank.waiting),
                tip,
            )
        )
    dots, slow_dots, dot_ticks = _dots(ranks) if hidden else ("", [], [])
    return Boxes(
        top + len(rows) * _ROW + 8,
        [Tick(x(t), short(t) if t else "0") for t in nice(0, most, 6)],
        [Tick(split + wait(t), short(t) if t else "0") for t in nice(0, longest, 2)],
        rows,
        split,
        hidden,
        dots,
        slow_dots,
        dot_ticks,
    )


def _chosen_ranks(ranks: Sequence[RankPace]) -> tuple[list[RankPace], int]:
    """Where there are too many: stragglers, the slowest, and others at even distances."""
    if len(ranks) <= MOST_ROWS:
        return list(ranks), 0
    order = sorted(ranks, key=lambda rank: (not rank.slow, -rank.p50))
    first, rest = order[: MOST_ROWS // 2], sorted(order[MOST_ROWS // 2 :], key=_number)
    room = MOST_ROWS - len(first)
    even = [rest[n * len(rest) // room] for n in range(room)]
    return sorted(first + even, key=_number), len(ranks) - MOST_ROWS


def _number(rank: RankPace) -> int:
    return rank.rank


def _dots(ranks: Sequence[RankPace]) -> tuple[str, list[Glyph], list[Tick]]:
    x = Scale(ranks[0].rank, ranks[-1].rank, LABELS, WIDTH - RIGHT)
    most = max(rank.p50 for rank in ranks) * 1.1
    y = Scale(0, most, 130, 10)
    path = "".join(f"M{x(rank.rank)},{y(rank.p50)}h.1" for rank in ranks if not rank.slow)
    slow = [
        Glyph("slow", x(rank.rank), y(rank.p50), f"rank {rank.rank}: {short(rank.p50)} in a step")
        for rank in ranks
        if rank.slow
    ]
    return path, slow[:200], [Tick(y(t), short(t) if t else "0") for t in nice(0, most, 3)]


def stack(parts: dict[str, float], whole: float, tips: dict[str, str]) -> list[Bar]:
    """A bar of parts side by side."""
    made: list[Bar] = []
    at = 0.0
    for name, seconds in parts.items():
        width = round(seconds / whole * WIDTH, 2) if whole else 0.0
        if width > 0:
            made.append(Bar(name, round(at, 2), 0, width, 44, tips[name]))
        at += width
    return made


def as_numbers(points: Sequence[tuple[float, float, int, str]]) -> list[Any]:
    """For the page's script."""
    return [list(point) for point in points]
