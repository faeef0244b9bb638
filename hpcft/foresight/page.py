"""The forecast as a page: one file of HTML that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from hpcft import __version__
from hpcft.foresight.forecast import Forecast, Mean
from hpcft.report.amounts import duration, percent
from hpcft.report.drawing import LABELS, RIGHT, WIDTH, Scale, Tick, nice, stack
from hpcft.report.words import MEANINGS, PARTS

_HEIGHT, _TOP, _BOTTOM = 280.0, 20.0, 240.0


@dataclass(frozen=True)
class Curve:
    """Something over the values of an option.

    name, kind: what it is, and how it is drawn.
    line: SVG path of the means; ``band`` of their confidence, empty if there is none.
    dots: place of each mean, and what it says when pointed at.
    """

    name: str
    kind: str
    line: str
    band: str
    dots: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Picture:
    """Curves over the values of an option.

    marks: upright lines, and what they are.
    """

    title: str
    height: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    curves: Sequence[Curve]
    marks: Sequence[Tick]


@dataclass(frozen=True)
class _Asked:
    name: str
    kind: str
    of: Callable[[Forecast], Mean]


def _yield(found: Forecast) -> Mean:
    """As a mean, of which only the mean is told."""
    return Mean(found.yield_, found.yield_, found.yield_)


_ASKED = (
    _Asked("work done", "steps", lambda found: found.work),
    _Asked("goodput", "resize", lambda found: found.part),
    _Asked("of what is paid for", "relaunch", _yield),
)


def picture(
    title: str,
    rows: Sequence[tuple[float, Forecast]],
    labels: Sequence[str],
    marks: Sequence[tuple[float, str]] = (),
    asked: Sequence[_Asked] = _ASKED,
) -> Picture:
    """Draw forecasts over a value; the values are spread evenly where they grow by ratios."""
    xs = [value for value, _ in rows]
    log = min(xs) > 0 and max(xs) / min(xs) > 8 and len(xs) > 2
    x = Scale(min(xs), max(xs), LABELS + 10, WIDTH - RIGHT - 10, log)
    means = [one.of(found) for one in asked for _, found in rows]
    low, high = min(mean.low for mean in means), max(mean.high for mean in means)
    room = 0.05 * (high - low) or 0.001
    low, high = max(0.0, low - room), min(1.0, high + room)
    y = Scale(low, high, _BOTTOM, _TOP)
    curves = []
    for one in asked:
        points = [(x(value), one.of(found)) for value, found in rows]
        line = "M" + "L".join(f"{at},{y(mean.mean)}" for at, mean in points)
        upper = [f"{at},{y(mean.high)}" for at, mean in points]
        lower = [f"{at},{y(mean.low)}" for at, mean in reversed(points)]
        band = f"M{'L'.join(upper + lower)}Z"
        dots = [
            (at, y(mean.mean), f"{title} {label}: {one.name} {100 * mean.mean:.2f} %")
            for (at, mean), label in zip(points, labels, strict=True)
        ]
        curves.append(Curve(one.name, one.kind, line, band, dots))
    every = max(1, len(xs) // 9)
    ticks = [Tick(x(value), label) for value, label in zip(xs, labels, strict=True)][::every]
    return Picture(
        title,
        _HEIGHT,
        ticks,
        [Tick(y(value), f"{100 * value:.4g} %") for value in nice(low, high, 5)],
        curves,
        [Tick(x(value), text) for value, text in marks if min(xs) <= value <= max(xs)],
    )


def draw(
    found: Forecast,
    tried: Sequence[tuple[float, Forecast]],
    marks: Sequence[tuple[float, str]],
    swept: str,
    labels: Sequence[str],
    rows: Sequence[tuple[float, Forecast]],
) -> str:
    """The page, as text.

    Parameters
    ----------
    tried: intervals between files, with their forecasts; none if there is nothing to choose.
    marks: intervals to point out, and what they are.
    swept, labels, rows: what was swept over, its values in words, and their forecasts.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("hpcft.foresight"), PackageLoader("hpcft.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "percent": percent}
    parts = found.goodput.parts
    rest = sorted(((s, name) for name, s in parts.items() if name != "steps" and s > 0))
    ordered = {"steps": parts["steps"]} | {name: s for s, name in reversed(rest)}
    whole = found.goodput.whole
    tips = {name: f"{PARTS[name][0]}: {duration(s)}" for name, s in ordered.items()}
    pictures = []
    if rows:
        pictures.append(picture(swept, rows, labels))
    if tried:
        written = [duration(value) for value, _ in tried]
        pictures.append(picture("time between files", tried, written, marks, _ASKED[:2]))
    return environment.get_template("plan.html.j2").render(
        found=found,
        machine=found.scenario.machine,
        parts=ordered,
        names={name: words[0] for name, words in PARTS.items()},
        meanings=MEANINGS,
        stack=stack(ordered, whole, tips),
        pictures=pictures,
        width=WIDTH,
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M:%S"),
    )
