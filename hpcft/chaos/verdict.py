"""What a run did about the faults it was given, by its events, and whether that is good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpcft.chaos.campaign import Deed
from hpcft.telemetry.events import ANEW, Event

Expect = Literal["survive", "recover"]
Answer = Literal[
    "refused", "substitute", "shrink", "spare lost", "relaunch", "said", "went on", "open"
]

#: Clocks of hosts differ, and a death may be known before it is told.
_SLACK = 1.0
#: Trouble that is told of a fault that has killed nobody, so long after its end.
_LATER = 10.0
_TROUBLE = ("save failed", "save skipped", "damaged", "copies failed", "drain failed")
#: Answers that need no start of all ranks.
_IN_PLACE = ("substitute", "shrink", "spare lost", "said", "went on", "refused")


@dataclass(frozen=True)
class Finding:
    """What the run did about one fault.

    order: as a schedule has it; who was hit, at which step and when (seconds since 1970).
    answer: ``substitute``, ``shrink``, ``relaunch`` (all ranks were started again), ``spare
        lost``; ``said`` (it was told, and nothing else needed); ``went on``: nothing was noticed;
        ``open``: there is no answer yet; ``refused``: it was not done.
    detail: in words.
    recovery_s: seconds from the fault to the next step; None if nothing had to be healed.
    """

    order: str
    who: str
    step: int
    time: float | None
    answer: Answer
    detail: str
    recovery_s: float | None


@dataclass(frozen=True)
class Verdict:
    """The end of it.

    passed: whether it is good enough.
    reasons: why not, a sentence each.
    """

    passed: bool
    expect: Expect
    reasons: tuple[str, ...]
    findings: tuple[Finding, ...]
    state: str
    step: int
    checkpoints: tuple[dict[str, Any], ...]


def findings(deeds: Sequence[Deed], events: Sequence[Event]) -> list[Finding]:
    """What the run did about each."""
    return [_finding(deed, events, _next(deed, deeds)) for deed in deeds]


def _next(deed: Deed, deeds: Sequence[Deed]) -> float:
    """When one of those it has hit was hit again; what they die of from then on is due to that."""
    return min(
        (
            other.done - _SLACK
            for other in deeds[deeds.index(deed) + 1 :]
            if other.done is not None and set(other.worlds) & set(deed.worlds)
        ),
        default=math.inf,
    )


def _finding(deed: Deed, events: Sequence[Event], until_next: float) -> Finding:
    def found(answer: Answer, detail: str, until: float | None = None) -> Finding:
        seconds = None if until is None or deed.done is None else max(0.0, until - deed.done)
        return Finding(
            deed.order.text,
            deed.who,
            deed.step,
            deed.done,
            answer,
            detail,
            None if seconds is None else round(seconds, 6),
        )

    if deed.refused or deed.done is None:
        return found("refused", deed.refused or "it was not done")
    begin = deed.done - _SLACK
    after = [event for event in events if event.time >= begin and event.kind != "chaos"]
    later = next((n for n, e in enumerate(after) if e.kind in ANEW), len(after))
    failed = next(
        (
            (n, e)
            for n, e in enumerate(after[:later])
            if e.kind == "failure" and e.detail.get("world") in deed.worlds and e.time < until_next
        ),
        None,
    )
    if failed:
        number, failure = failed
        cause = str(failure.detail.get("cause") or "unknown")
        if failure.detail.get("role") == "spare":
            return found("spare lost", cause)
        rest = after[number:later]
        resume = next((e for e in rest if _of(e, "resume", failure)), None)
        if resume:
            recovered = next((e for e in rest if _of(e, "recovered", failure)), None)
            until = recovered.time if recovered else resume.time
            action = resume.detail.get("action")
            shrunk = any(e.kind == "shrink" and e.epoch == failure.epoch for e in rest)
            answer: Answer = "shrink" if shrunk or action == "shrink" else "substitute"
            return found(answer, cause, until)
    if later < len(after) and (failed or _took(deed) or after[later].kind == "relaunch"):
        relaunch = after[later]
        again = next((e for e in after[later:] if e.kind in ("restore", "start")), None)
        why = str(relaunch.detail.get("reason") or "")
        return found("relaunch", why, again.time if again else None)
    if failed or _took(deed):
        return found("open", "nothing was done about it")
    end = (deed.undone or deed.done) + _LATER
    trouble = next((e for e in after if e.kind in _TROUBLE and e.time <= end), None)
    if trouble:
        return found("said", f"{trouble.kind}: {trouble.detail.get('why') or ''}")
    return found("went on", "nothing was noticed, or had to be")


def _of(event: Event, kind: str, failure: Event) -> bool:
    return event.kind == kind and event.epoch == failure.epoch


def _took(deed: Deed) -> bool:
    """Whether it has killed somebody for sure."""
    return deed.order.kind in ("kill", "node")


def settled(deeds: Sequence[Deed], events: Sequence[Event]) -> bool:
    """Whether the run has answered all of them."""
    return all(one.answer != "open" for one in findings(deeds, events))


def judge(
    deeds: Sequence[Deed],
    events: Sequence[Event],
    expect: Expect,
    state: str,
    step: int,
    checkpoints: Sequence[dict[str, Any]],
) -> Verdict:
    """Whether the run did what is expected.

    Parameters
    ----------
    state: of the run now, as ``hpcft ps`` has it; step: how far it is.
    checkpoints: what was found of each: its path, and whether it is ok.
    """
    found = findings(deeds, events)
    reasons = []
    if all(one.answer == "refused" for one in found):
        reasons.append("No fault was done.")
    if state not in ("training", "ok"):
        reasons.append(f"The run does not train any more: it is {state}.")
    last = max((deed.step for deed in deeds if deed.done is not None), default=-1)
    if state == "training" and step <= last:
        reasons.append(
            f"No step was completed after step {last}, at which the last fault was done."
        )
    for deed, one in zip(deeds, found, strict=True):
        what = f"{one.order} ({one.who})"
        if one.answer == "open" and state != "ok":
            reasons.append(f"{what}: nothing was done about it.")
        if expect == "recover" and one.answer not in (*_IN_PLACE, "open"):
            reasons.append(f"{what}: all ranks had to be started again.")
        if deed.left:
            reasons.append(f"{what}: it could not be undone; call `hpcft chaos --undo`.")
    for one_of in checkpoints:
        if not one_of["ok"]:
            reasons.append(f"The checkpoint {one_of['path']} is damaged.")
    return Verdict(
        not reasons, expect, tuple(reasons), tuple(found), state, step, tuple(checkpoints)
    )
