"""Having Slurm start a job again whose run has left something to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from hpcft.slurm.job import Job, find_job
from hpcft.slurm.scontrol import Refused
from hpcft.telemetry.events import Event


@dataclass(frozen=True)
class Budget:
    """What a job may be requeued.

    restarts: how often it was already.
    most: how often it may be.
    """

    restarts: int
    most: int

    def objection(self, events: Sequence[Event], bad: Collection[str]) -> str:
        """Why a run with these events is no reason to start it again; empty if it is.

        A job that fails at once would be requeued for ever.

        Parameters
        ----------
        bad: names of the nodes the run has lost.
        """
        if self.restarts >= self.most:
            return f"it was {self.restarts} times already, the most that --max-requeue allows"
        if bad and not any(e.kind == "start" for e in events):
            # It could not even begin, and the next is to do without these.
            return ""
        # What is restored later was saved by this run.
        first = next((e for e in events if e.kind in ("restore", "checkpoint")), None)
        began = first.step if first and first.kind == "restore" else -1
        saved = max((e.step for e in events if e.kind == "checkpoint"), default=-1)
        if saved <= began:
            since = f"since step {began}, where it was taken up" if began >= 0 else "at all"
            return f"this run has saved no progress {since}"
        return ""


def conclude(number: str, restarts: int, events: Sequence[Event], how: str) -> None:
    """Note in the job's record how its last run has ended."""
    _note(find_job(number), f"step {_step(events)}, restart {restarts}, {how}")


def requeue(
    number: str, budget: Budget, events: Sequence[Event], bad: Collection[str], wanted: int
) -> tuple[Event, str]:
    """Have the job start again, if that makes sense, on other nodes than the bad ones.

    Parameters
    ----------
    number: of the job.
    events: of its run.
    bad: names of the nodes it has lost.
    wanted: how many nodes it needs.

    Returns
    -------
    The event ``requeue``, and what is to be said of it.
    """
    job = find_job(number)
    why = budget.objection(events, bad) or _requeue(job, budget.restarts)
    text = f"not requeued: {why}" if why else "requeued"
    excluded: list[str] = []
    if job and bad and not why:
        # It cannot start before this process, which belongs to it, has ended.
        try:
            excluded = job.exclude(bad, wanted)
        except Refused as error:
            text += f", maybe with {','.join(sorted(bad))}: {error}"
        else:
            text += f" without {','.join(excluded)}" if excluded else ""
            if kept := sorted(set(bad) - set(excluded)):
                text += f", maybe with {','.join(kept)}: there are too few other nodes"
    text = f"step {_step(events)}, restart {budget.restarts}, {text}"
    _note(job, text)
    detail = {"requeued": not why, "why": why, "excluded": excluded}
    return Event("requeue", _step(events), detail=detail), f"hpcft: job {number}: {text}"


def _requeue(job: Job | None, restarts: int) -> str:
    """Requeue a job; why that could not be, or nothing."""
    if job is None:
        return "the controller does not answer"
    if problem := job.problem:
        return problem
    if job.restarts > restarts:
        # Who has ended it has had it requeued, too.
        return ""
    if job.state != "RUNNING" and job.reason != "TimeLimit":
        return f"somebody has ended it ({job.state})"
    try:
        job.requeue()
    except Refused as error:
        return f"Slurm says: {error}"
    return ""


def _step(events: Sequence[Event]) -> int:
    return max((e.step for e in events), default=0)


def _note(job: Job | None, text: str) -> None:
    # It is good to have; the summary has the same.
    with contextlib.suppress(Refused):
        if job:
            job.note(text)
