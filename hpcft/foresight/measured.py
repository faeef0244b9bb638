"""The stack's times as a run has measured them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hpcft.report.record import Chapter
from hpcft.report.story import Story
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory


@dataclass(frozen=True)
class Measured:
    """Medians in seconds, and sizes; None: the run has nothing to tell of it.

    nodes, ranks_per_node, spares: how it began; spares are counted in whole nodes.
    The others: as of :class:`hpcft.foresight.scenario.Stack` and ``Tier``.
    """

    nodes: int | None = None
    ranks_per_node: int | None = None
    spares: int | None = None
    step: float | None = None
    detect: float | None = None
    adopt: float | None = None
    shrink: float | None = None
    relaunch: float | None = None
    resize: float | None = None
    start: float | None = None
    ckpt_cost: float | None = None
    ckpt_write: float | None = None


def measure(story: Story, chapters: Sequence[Chapter]) -> Measured:
    """Of a run that has been told."""
    events = [event for chapter in chapters for event in chapter.events]
    active = [e for e in events if e.kind == "failure" and e.detail.get("role") != "spare"]
    spans: dict[str, list[float]] = {}
    for span in story.spans:
        spans.setdefault(span.doing, []).append(span.seconds)
    files = [event for event in events if event.kind == "checkpoint"]
    goodput = story.goodput
    training = goodput.steps + goodput.waiting + goodput.again
    # Without laps nobody knows what the saves have cost.
    told = goodput.measured > 0 and files
    nodes, per_node, spares = _sizes(events, chapters)
    return Measured(
        nodes,
        per_node,
        spares,
        training / story.step if story.step else None,
        _median([float(event.detail.get("detect_s") or 0) for event in active]),
        _median(_recoveries(events, "substitute")),
        _median(_recoveries(events, "shrink")),
        _median(spans.get("relaunch", [])),
        _median(spans.get("resize", [])),
        _median(spans.get("starting", [])),
        goodput.saving / len(files) if told else None,
        _median([float(event.detail.get("seconds") or 0) for event in files]),
    )


def _recoveries(events: Sequence[Event], action: str) -> list[float]:
    return [
        float(event.detail.get("recover_s") or 0)
        for event in events
        if event.kind == "resume" and event.detail.get("action") == action
    ]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _sizes(
    events: Sequence[Event], chapters: Sequence[Chapter]
) -> tuple[int | None, int | None, int | None]:
    start = next((event for event in events if event.kind == "start"), None)
    hosts = {str(entry["host"]) for entry in RunDirectory(chapters[-1].path).ranks()}
    if not start or not hosts:
        return None, None, None
    active, spares = int(start.detail["active"]), int(start.detail["spares"])
    per_node = max(1, round((active + spares) / len(hosts)))
    nodes = max(1, -(-active // per_node))
    return nodes, per_node, spares // per_node
