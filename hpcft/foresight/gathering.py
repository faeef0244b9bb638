"""Gathering what is on record of nodes: by runs, the site's history, Slurm, and this machine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.ckpt.errand import Errand
from hpcft.errors import HpcftError, UsageError
from hpcft.foresight import evidence, rates, signals
from hpcft.foresight.evidence import Record
from hpcft.foresight.rates import Rates, Seen
from hpcft.foresight.signals import Sign
from hpcft.launch.cause import oom_kills
from hpcft.report.amounts import duration
from hpcft.slurm import records as slurm
from hpcft.telemetry import uptime
from hpcft.telemetry.uptime import Stretch
from hpcft.watch.runs import PATIENCE, SILENCE, Jobs, Run, find, known

#: How far back Slurm is asked, in seconds.
SINCE = 90 * 86400.0


@dataclass(frozen=True)
class Gathered:
    """What there is to go by.

    sources: what was looked at, and what it had, a sentence each.
    jobs: failures and hours by Slurm's jobs, of which nobody knows whose they were; used where
        there is no better record of Slurm's.
    """

    stretches: tuple[Stretch, ...]
    sources: tuple[str, ...]
    signs: tuple[Sign, ...]
    jobs: Seen | None


@dataclass(frozen=True)
class Estimate:
    """What follows from it.

    records: of each node.
    rates: with the signs of trouble.
    factors: how many times as high the rates of some nodes are taken, for these.
    """

    records: list[Record]
    rates: Rates
    factors: dict[str, float]

    @property
    def between(self) -> float:
        """Mean seconds between two failures of one node."""
        return 3600 / self.rates.node.mean


def gather(
    tell: Callable[[str], None],
    names: Sequence[str] = (),
    history: Path | None = None,
    since: float | None = SINCE,
    live: bool = True,
) -> Gathered:
    """Look at all of it.

    Parameters
    ----------
    tell: told what is being done.
    names: of the runs to learn from; none: all that are known here.
    history: the site's; None: what the environment names.
    since: how many seconds back Slurm is asked; None: it is not.
    live: also look for signs of trouble on this machine.

    Raises
    ------
    HpcftError: something that was named cannot be read.
    """
    found: list[Stretch] = []
    sources: list[str] = []
    signs: list[Sign] = []
    found += _of_runs(names, sources, signs, tell)
    found += _of_history(history, sources)
    jobs = None
    if since is not None:
        tell("asking Slurm ...")
        own, jobs_told = _of_slurm(since, sources, signs)
        found += own
        if jobs_told and not own:
            jobs = Seen("", jobs_told.failed, jobs_told.node_hours)
    if live:
        signs += signals.here(socket.gethostname(), oom_kills())
    stretches = tuple(stretch for stretch in found if stretch.hours > 0 or stretch.failed)
    return Gathered(stretches, tuple(sources), tuple(signs), jobs)


def estimate(gathered: Gathered) -> Estimate:
    """How often nodes fail, by what was gathered."""
    records = evidence.records(gathered.stretches)
    base = rates.estimate([record.seen for record in records], gathered.jobs)
    factors = signals.factors(gathered.signs)
    return Estimate(records, base.raised(factors) if factors else base, factors)


def _of_runs(
    names: Sequence[str], sources: list[str], signs: list[Sign], tell: Callable[[str], None]
) -> list[Stretch]:
    """Of those named, or of all."""
    found: list[Stretch] = []
    runs = [find(name) for name in names] or known()
    jobs = Jobs(runs)
    read = 0
    for number, run in enumerate(runs):
        tell(f"reading run {number + 1} of {len(runs)} ...")
        errand = Errand(lambda run=run: _of_run(run, jobs))  # type: ignore[misc]
        try:
            own, sign = errand.result(PATIENCE)
        except (OSError, ValueError, LookupError, TypeError) as error:
            if names:
                raise HpcftError(f"{run.rundir.path} cannot be read: {error}") from error
            continue
        read += bool(own)
        found += own
        signs += [sign] if sign else []
    asked = "named" if names else "known here"
    sources.append(f"{read} of {len(runs)} runs {asked} have something to tell")
    return found


def _of_run(run: Run, jobs: Jobs) -> tuple[list[Stretch], Sign | None]:
    """What it has seen, and whether it is late, if it runs."""
    rundir, now = run.rundir, time.time()
    status = None if rundir.summary() else rundir.status()
    # Where nobody can tell, a status that is not too old does.
    alive = bool(status) and run.alive(jobs)
    if status and alive is None:
        alive = now - float(status["time"]) < SILENCE
    begun = run.entry.begun if run.entry else None
    own = evidence.of_run(run.name, rundir.path, begun, now if alive else None)
    leader = next((e for e in rundir.ranks() if e.get("logical") == 0), None) if alive else None
    if not status or not leader:
        return own, None
    return own, signals.late(str(leader["host"]), now - float(status["time"]))


def _of_history(asked: Path | None, sources: list[str]) -> list[Stretch]:
    path = asked or (Path(os.environ[uptime.HISTORY]) if _named() else None)
    if path is None:
        sources.append(f"no history: neither --history nor {uptime.HISTORY} names one")
        return []
    try:
        lines = list(uptime.read(path))
    except FileNotFoundError:
        if asked:
            raise UsageError(f"there is no history {path}", "see --history") from None
        sources.append(f"the history {path} is not there yet: no run has ended with it")
        return []
    except OSError as error:
        raise HpcftError(f"{path} cannot be read: {error.strerror or error}") from error
    good = [line for line in lines if line]
    torn = f"; {len(lines) - len(good)} lines are no good" if len(good) < len(lines) else ""
    sources.append(f"history {path}: {len(good)} stretches of nodes{torn}")
    return good


def _named() -> bool:
    return bool(os.environ.get(uptime.HISTORY))


def _of_slurm(
    since: float, sources: list[str], signs: list[Sign]
) -> tuple[list[Stretch], slurm.Jobs | None]:
    states = slurm.states()
    if not states:
        sources.append("no Slurm that answers")
        return [], None
    for node, (state, reason) in sorted(states.items()):
        bad = any(word in state for word in ("down", "fail", "drain"))
        if bad:
            signs.append(Sign("slurm", node, True, f"Slurm has it as {state}: {reason or '?'}"))
    now = time.time()
    outages = slurm.outages(now - since)
    jobs = slurm.jobs(now - since)
    said = "Slurm keeps no accounts of its nodes"
    if outages is not None:
        unplanned = sum(not outage.planned for outage in outages)
        said = f"Slurm: {len(states)} nodes, {len(outages)} outages, {unplanned} not planned"
    if jobs:
        said += f"; {jobs.failed} jobs ended by nodes in {jobs.node_hours:,.0f} node-hours"
    sources.append(f"{said} (last {duration(since)})")
    if outages is None:
        return [], jobs
    return evidence.of_slurm(states, outages, now - since, now), jobs
