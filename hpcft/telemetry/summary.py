"""The summary of a run, made from its events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpcft.telemetry.events import ENDS, Event

#: What is told of a straggler, and of one that has changed places with a spare.
_EVIDENCE = ("world", "host", "compute_s", "others_s", "factor")
_REPLACED = ("world", "host", "slow_world", "slow_host", "seconds")


def _about(event: Event, names: Sequence[str]) -> dict[str, Any]:
    detail = {name: event.detail.get(name) for name in names}
    return {"step": event.step, "ranks": list(event.ranks), **detail}


def summarise(events: list[Event]) -> dict[str, Any]:
    """What ``summary.json`` holds, derived from the event log alone.

    So whoever is left can write it: the ranks at a good end, a shepherd or the launcher after a
    bad one. Times are in seconds; those of a failure nobody recovered from are None.
    """
    start = next((e for e in events if e.kind == "start"), None)
    end = next((e for e in reversed(events) if e.kind in ENDS), None)
    requeue = next((e for e in reversed(events) if e.kind == "requeue"), None)
    world = {
        "initial": start.detail["active"] if start else 0,
        "final": start.detail["active"] if start else 0,
        "spares_left": start.detail["spares"] if start else 0,
    }
    failures: list[dict[str, Any]] = []
    anew: dict[str, list[dict[str, Any]]] = {"relaunch": [], "resize": []}
    by_epoch: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event.kind in anew:
            anew[event.kind].append({"step": event.step, "reason": event.detail["reason"]})
            # Epochs are counted anew.
            by_epoch = {}
        elif event.kind == "start":
            world["final"] = event.detail["active"]
            world["spares_left"] = event.detail["spares"]
        if event.kind == "failure":
            failure = {
                "step": event.step,
                "ranks": list(event.ranks),
                "cause": event.detail["cause"],
                "action": "none",
                "detect_s": event.detail["detect_s"],
                "recover_s": None,
                "stall_s": None,
                "lost_steps": 0,
                "role": event.detail["role"],
            }
            failures.append(failure)
            # Which needs no recovery; one that comes later says how many are left.
            world["spares_left"] -= event.detail["role"] == "spare"
            by_epoch.setdefault(event.epoch, []).append(failure)
        elif event.kind == "resume":
            world["final"] = event.detail["active"]
            world["spares_left"] = event.detail["spares"]
            for failure in by_epoch.get(event.epoch, []):
                failure["action"] = event.detail["action"]
                failure["recover_s"] = event.detail["recover_s"]
                failure["lost_steps"] = event.detail["lost_steps"]
                failure["phases"] = event.detail["phases"]
        elif event.kind == "recovered":
            for failure in by_epoch.get(event.epoch, []):
                failure["stall_s"] = event.detail["stall_s"]
    return {
        "result": ENDS[end.kind] if end else "failed",
        "reason": end.detail.get("reason", "") if end else "the run was ended from outside",
        "steps": end.step if end else max((e.step for e in events), default=0),
        "world": world,
        "restarts": start.detail.get("restarts", 0) if start else 0,
        "requeue": requeue.detail if requeue else None,
        "restored_step": next((e.step for e in events if e.kind == "restore"), None),
        "checkpoints": [e.step for e in events if e.kind == "checkpoint"],
        "failures": failures,
        "stragglers": [_about(e, _EVIDENCE) for e in events if e.kind == "straggler"],
        "replacements": [_about(e, _REPLACED) for e in events if e.kind == "replaced"],
        "relaunches": anew["relaunch"],
        "resizes": anew["resize"],
        "params_sha256": end.detail.get("params_sha256") if end else None,
        "seconds": round(end.time - start.time, 3) if start and end else None,
    }
