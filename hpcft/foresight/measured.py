"""The stack's times as a run has measured them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from hpcft.report.record import Chapter
from hpcft.report.story import Story
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory


@dataclass(frozen=True)
class Measured:
    """Means in seconds, and sizes; None: the run has nothing to tell of it.

    Means, and no medians, for what a campaign loses is the sum.

    nodes, ranks_per_node, spares: how it began; spares are counted in whole nodes. On a single host
        each rank stands for a node, for what fails there is a rank.
    ckpt_restore, near_restore: 0 if ``relaunch`` is known, which has them in it.
    The others: as of :class:`hpcft.foresight.scenario.Stack` and ``Tier``.
    """

    nodes: int | None = None
    ranks_per_node: int | None = None
    spares: int | None = None
    step: float | None = None
    waiting: float | None = None
    detect: float | None = None
    adopt: float | None = None
    shrink: float | None = None
    relaunch: float | None = None
    resize: float | None = None
    start: float | None = None
    end: float | None = None
    ckpt_cost: float | None = None
    ckpt_write: float | None = None
    ckpt_restore: float | None = None
    near_restore: float | None = None


def measure(story: Story, chapters: Sequence[Chapter]) -> Measured:
    """Of a run that has been told."""
    events = [event for chapter in chapters for event in chapter.events]
    active = [e for e in events if e.kind == "failure" and e.detail.get("role") != "spare"]
    detect = _mean([float(event.detail.get("detect_s") or 0) for event in active])
    spans: dict[str, list[float]] = {}
    for span in story.spans:
        spans.setdefault(span.doing, []).append(span.seconds)
    # A plan counts from when a failure is known; spans begin with the failure.
    relaunch = _mean([max(0.0, took - (detect or 0.0)) for took in spans.get("relaunch", [])])
    restore = None if relaunch is None else 0.0
    files = [event for event in events if event.kind == "checkpoint"]
    goodput = story.goodput
    training = goodput.steps + goodput.waiting
    # Without laps nobody knows what training was, and what the saves have cost.
    told = goodput.measured > 0
    nodes, per_node, spares = _sizes(events, chapters)
    return Measured(
        nodes,
        per_node,
        spares,
        step=training / story.step if story.step else None,
        waiting=goodput.waiting / training if told and training else None,
        detect=detect,
        adopt=_recovery(story, events, "substitute", detect),
        shrink=_recovery(story, events, "shrink", detect),
        relaunch=relaunch,
        resize=_mean(spans.get("resize", [])),
        start=_mean(spans.get("starting", [])),
        end=_mean(spans.get("ending", [])) if story.state in ("ok", "interrupted") else None,
        ckpt_cost=goodput.saving / len(files) if told and files else None,
        ckpt_write=_mean([float(event.detail.get("seconds") or 0) for event in files]),
        ckpt_restore=restore,
        near_restore=restore,
    )


def _recovery(
    story: Story, events: Sequence[Event], action: str, detect: float | None
) -> float | None:
    """From when a failure is known until the ranks go on, if that was done about it."""
    resumed = {
        event.time
        for event in events
        if event.kind == "resume" and event.detail.get("action") == action
    }
    spans = [s for s in story.spans if s.doing == "recovery" and s.end in resumed]
    return _mean([max(0.0, span.seconds - (detect or 0.0)) for span in spans])


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _sizes(
    events: Sequence[Event], chapters: Sequence[Chapter]
) -> tuple[int | None, int | None, int | None]:
    start = next((event for event in events if event.kind == "start"), None)
    hosts = {str(entry["host"]) for entry in RunDirectory(chapters[-1].path).ranks()}
    hosts |= {str(event.detail.get("host")) for event in events if event.kind == "failure"}
    if not start or not hosts:
        return None, None, None
    active, spares = int(start.detail["active"]), int(start.detail["spares"])
    per_node = max(1, round((active + spares) / len(hosts))) if len(hosts) > 1 else 1
    nodes = max(1, -(-active // per_node))
    return nodes, per_node, spares // per_node
