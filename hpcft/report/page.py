"""The report as a page: one file of HTML that needs nothing else."""

from __future__ import annotations

import json
import time

from jinja2 import Environment, PackageLoader, StrictUndefined

from hpcft.report.amounts import duration, percent, short
from hpcft.report.drawing import boxes, cut_short, lanes, plot, stack
from hpcft.report.story import Story
from hpcft.report.words import MEANINGS, PARTS

#: Rows of the list of incidents that are shown at once.
_SHOWN = 12
_DOINGS = {name: words[0] for name, words in PARTS.items()} | {"training": "training"}
_KINDS = {
    "failure": "failure",
    "adoption": "a spare took over",
    "shrink": "went on with fewer",
    "relaunch": "all started again",
    "resize": "resized",
    "restart": "restart by Slurm",
    "checkpoint": "checkpoint",
    "save failed": "trouble with a checkpoint",
    "restore": "restored",
    "slow": "slower than the others",
    "memory": "memory short, or there again",
    "chaos": "fault on purpose",
    "end": "end",
}


def draw(story: Story) -> str:
    """The page, as text."""
    # All that comes from logs, metrics and names is escaped.
    environment = Environment(
        loader=PackageLoader("hpcft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "duration": duration,
        "short": short,
        "percent": percent,
        "clock": _clock,
        "cut": cut_short,
        "compact": lambda value: json.dumps(value, separators=(",", ":")),
    }
    whole = story.goodput.whole
    parts = story.goodput.parts
    rest = sorted(
        ((s, name) for name, s in parts.items() if name != "steps" and s > 0), reverse=True
    )
    ordered = {"steps": parts["steps"]} | {name: seconds for seconds, name in rest}
    tips = {
        name: f"{PARTS[name][0]}: {duration(seconds)}, "
        f"{percent(seconds / whole if whole else 0)}\n{MEANINGS[name]}"
        for name, seconds in ordered.items()
    }
    slow = {rank.rank for rank in story.ranks if rank.slow}
    return environment.get_template("report.html.j2").render(
        story=story,
        parts=ordered,
        names=_DOINGS,
        kinds=_KINDS,
        meanings=MEANINGS,
        stack=stack(ordered, whole, tips),
        lanes=lanes(story.spans, story.timeline, slow, _DOINGS) if story.spans else None,
        plots=[plot(curve, story.incidents) for curve in story.curves],
        boxes=boxes(story.ranks) if story.ranks else None,
        shown=_SHOWN,
        zone=time.strftime("%Z"),
    )


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
