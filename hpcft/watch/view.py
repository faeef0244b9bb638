"""What a run does at a moment, from what it writes down and what this host's kernel knows of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcft.telemetry import registry
from hpcft.telemetry.events import Event, cold_now, slow_now
from hpcft.telemetry.summary import summarise
from hpcft.watch.runs import SILENCE, Jobs, Run
from hpcft.world.progress import peek

State = Literal[
    "starting",
    "training",
    "queued",
    "silent",
    "ok",
    "interrupted",
    "failed",
    "killed",
    "no answer",
]
#: Those of a run that is over.
ENDED = ("ok", "interrupted", "failed", "killed")
#: Seconds for which runs that have ended are remembered.
_REMEMBERED = 7 * 86400.0


@dataclass(frozen=True)
class Rank:
    """A process of the run, or one that was.

    logical: its logical rank; None for a spare, or one that was a spare to the end.
    role: ``active``, ``spare``, or ``lost``.
    state: of one on this host, what it does: ``computing``, ``waiting`` (for other ranks),
        ``recovering``, ``parked``, ``outside job.run``, ``stopped`` or ``gone``; of one that is
        lost, why; else empty.
    step: steps it has completed; None if that is not known.
    slow: how many times as long as the others it computes, if it is a straggler; else None.
    cold: it is a spare that has given its memory back, and has to run its script to train.
    """

    logical: int | None
    world: int
    host: str
    pid: int | None
    role: str
    state: str
    step: int | None
    slow: float | None = None
    cold: bool = False


@dataclass(frozen=True)
class Saved:
    """The newest checkpoint the run has committed.

    bytes: its size; None if it is gone by now.
    time: when it was committed; seconds since 1970.
    """

    step: int
    path: str
    time: float
    bytes: int | None


@dataclass(frozen=True)
class View:
    """A run at a moment.

    name, run_dir, host, job, command: as it was started; empty where that is not known.
    state: ``starting`` until training begins, then ``training``; ``queued``: Slurm will start it
        again; ``silent``: nothing was heard for long, and nobody can tell why; at its end ``ok``,
        ``interrupted`` or ``failed``, or ``killed``, if it could not write a summary any more;
        ``no answer``: its directory is on a file system that does not answer.
    reason: why it has failed.
    time, begun: now, and when it was started; seconds since 1970.
    seconds: how long it has trained; None if it has not ended, or nobody knows.
    step: steps completed.
    stepped: when the last was; seconds since 1970.
    rate: steps a second, lately; None if it is not known or over.
    metrics: what the script said of the last step seen; None for what is not finite.
    active, spares: how many ranks train, and how many wait.
    checkpoints: directory they are saved to; empty if they are not, or it is not known.
    checkpoint: the newest; None if there is none yet.
    failures: as in ``summary.json``.
    """

    name: str
    run_dir: str
    state: State
    time: float
    host: str = ""
    job: str = ""
    command: tuple[str, ...] = ()
    reason: str = ""
    begun: float | None = None
    seconds: float | None = None
    step: int | None = None
    stepped: float | None = None
    rate: float | None = None
    metrics: dict[str, float | None] | None = None
    active: int = 0
    spares: int = 0
    ranks: tuple[Rank, ...] = ()
    checkpoints: str = ""
    checkpoint: Saved | None = None
    failures: tuple[dict[str, Any], ...] = ()

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def hosts(self) -> tuple[str, ...]:
        """Where its ranks are."""
        here = {rank.host for rank in self.ranks if rank.role != "lost"}
        return tuple(sorted(here)) or ((self.host,) if self.host else ())


def look(run: Run, jobs: Jobs) -> View:
    """See what a run does.

    Raises
    ------
    OSError, ValueError: its directory cannot be read.
    """
    now = time.time()
    rundir, entry = run.rundir, run.entry
    # In this order: what is there later is true of what was read earlier, too.
    status, events = rundir.status(), rundir.events()
    table, summary = rundir.ranks(), rundir.summary()
    told = summary or summarise(events)
    state = _state(run, jobs, now, status, events, summary)
    ended = state in ENDED
    step = told["steps"]
    if status:
        step = max(step, status["step"])
    ranks = _ranks(table, events, live=not ended)
    if not ended:
        step = max([step, *(rank.step for rank in ranks if rank.step and rank.role != "lost")])
    started = next((event.time for event in events if event.kind == "start"), None)
    return View(
        name=run.name,
        run_dir=str(rundir.path),
        state=state,
        time=now,
        host=entry.host if entry else "",
        job=entry.job if entry else "",
        command=entry.command if entry else (),
        reason=summary["reason"] if summary else "",
        begun=entry.begun if entry else started,
        seconds=summary["seconds"] if summary else None,
        step=step if status or events else None,
        stepped=status["stepped"] if status else None,
        rate=status["rate"] if status and not ended else None,
        metrics=status["metrics"] if status else None,
        active=sum(rank.role == "active" for rank in ranks),
        spares=sum(rank.role == "spare" for rank in ranks),
        ranks=ranks,
        checkpoints=entry.checkpoints if entry else "",
        checkpoint=_saved(events),
        failures=tuple(told["failures"]),
    )


def sweep(run: Run, view: View) -> bool:
    """Forget a run that ended long ago, or fell silent, or has ended and left no directory.

    Returns
    -------
    Whether it is forgotten.
    """
    entry = run.entry
    if entry is None or not (view.ended or view.state == "silent"):
        return False
    gone = view.ended and (entry.here or bool(entry.job)) and not run.rundir.path.is_dir()
    if not gone and time.time() - entry.begun < _REMEMBERED:
        return False
    registry.remove(entry)
    return True


def _state(
    run: Run,
    jobs: Jobs,
    now: float,
    status: dict[str, Any] | None,
    events: list[Event],
    summary: dict[str, Any] | None,
) -> State:
    if summary and summary["result"] != "interrupted":
        return "ok" if summary["result"] == "ok" else "failed"
    entry = run.entry
    if entry and entry.step and jobs.state(entry) == "PENDING":
        return "queued"
    if summary:
        return "interrupted"
    alive = run.alive(jobs)
    if alive is False:
        return "killed"
    heard = max(
        status["time"] if status else 0.0,
        max((event.time for event in events), default=0.0),
        entry.begun if entry else 0.0,
    )
    if alive is None and now - heard > SILENCE:
        return "silent"
    return "training" if status or events else "starting"


def _ranks(table: list[dict[str, Any]], events: list[Event], live: bool) -> tuple[Rank, ...]:
    found = []
    slow = {world: event.detail["factor"] for world, event in slow_now(events).items()}
    cold = cold_now(events)
    for entry in table:
        logical, world, pid = entry["logical"], entry["world"], entry["pid"]
        here = live and entry["host"].split(".")[0] == registry.host()
        state, step = _doing(pid, entry["role"]) if here else ("", None)
        role, factor = entry["role"], slow.get(world)
        spared = role == "spare" and world in cold
        found.append(Rank(logical, world, entry["host"], pid, role, state, step, factor, spared))
    failures = [event for event in events if event.kind == "failure"]
    healed = max((n for n, e in enumerate(events) if e.kind in ("resume", "start")), default=-1)
    # Those that nobody has recovered from are in the table still.
    gone = {event.detail["world"] for event in events[healed + 1 :] if event.kind == "failure"}
    found = [rank for rank in found if rank.world not in gone]
    for event in failures:
        detail, logical = event.detail, event.ranks[0] if event.ranks else None
        world, host, cause = detail["world"], detail["host"], detail["cause"]
        found.append(Rank(logical, world, host, None, "lost", cause, event.step))
    order = {"active": 0, "spare": 1, "lost": 2}
    return tuple(sorted(found, key=lambda rank: order[rank.role]))


def _doing(pid: int, role: str) -> tuple[str, int | None]:
    """State and step of a rank of this host."""
    try:
        kernel = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone", None
    reading = peek(pid)
    if reading is None or kernel in "ZX":
        return "gone", None
    if kernel in "Tt":
        return "stopped", reading.step
    if reading.mending:
        return "recovering", reading.step
    if role == "spare":
        return "parked", None
    if not reading.running:
        return "outside job.run", reading.step
    return "waiting" if reading.waiting else "computing", reading.step


def _saved(events: list[Event]) -> Saved | None:
    last = next((event for event in reversed(events) if event.kind == "checkpoint"), None)
    if last is None:
        return None
    path = Path(last.detail["path"])
    try:
        size = sum(file.stat().st_size for file in path.iterdir())
    except OSError:
        size = None
    return Saved(last.step, str(path), last.time, size)
