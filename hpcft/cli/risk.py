"""``hpcft risk``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpcft.ckpt.errand import Errand
from hpcft.cli import quantities
from hpcft.cli.output import Column, say, table
from hpcft.cli.runs import PATIENCE, RUN
from hpcft.errors import HpcftError, UsageError
from hpcft.launch.cause import oom_kills
from hpcft.report.amounts import duration
from hpcft.slurm import records as slurm
from hpcft.telemetry import uptime
from hpcft.telemetry.uptime import Stretch
from hpcft.watch.runs import SILENCE, Jobs, Run, find, known

if TYPE_CHECKING:
    from hpcft.foresight.aging import Aging
    from hpcft.foresight.evidence import Record
    from hpcft.foresight.rates import Chances, Interval, Rates, Seen
    from hpcft.foresight.signals import Sign

SUMMARY = "how often nodes fail, by the record, and what a job is to expect"

DESCRIPTION = f"""\
Estimate how often nodes fail, and with which probability a job meets failures, from what is on
record: runs, the site's history, Slurm's accounts; and signs of trouble on this machine now. All of
it with its uncertainty: of little evidence little is said.

    hpcft risk                                    all runs known here, history, Slurm, this machine
    hpcft risk RUN RUN                            these runs alone, besides history and Slurm
    hpcft risk --nodes 512 --hours 72             what a job of 512 nodes meets in three days
    hpcft risk --on n3,n7 --hours 24              a job on these nodes
    hpcft risk --history /site/hpcft-history.jsonl --no-slurm
    hpcft risk --json | jq .node.mean             failures a node-hour

A run adds itself to the site's history at its end if {uptime.HISTORY} names the file, which is also
read here; it may be one for all users. docs/foresight.md explains the estimates.

{RUN}"""

_EPILOG = """\
exit code: 0 done; 1 something that was named cannot be read; 2 wrong usage
"""


@dataclass(frozen=True)
class _Gathered:
    """What there is to go by.

    sources: what was looked at, and what it had, a sentence each.
    jobs: failures and hours by Slurm's jobs, of which nobody knows whose they were; used where
        there is no better record of Slurm's.
    """

    stretches: list[Stretch]
    sources: list[str]
    signs: list[Sign]
    jobs: Seen | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="runs to learn from (default: all known here)")
    add(
        "--history",
        type=Path,
        metavar="FILE",
        help=f"the site's history (default: what {uptime.HISTORY} names)",
    )
    add("--no-slurm", action="store_true", help="do not ask Slurm")
    add(
        "--since",
        type=quantities.seconds,
        default=90 * 86400.0,
        metavar="TIME",
        help="how far back Slurm is asked (default: 90d)",
    )
    add("--no-live", action="store_true", help="leave out the signs of trouble on this machine")
    add("--nodes", type=int, metavar="N", help="of the job (default: as many as are on record)")
    add("--on", metavar="NODES", help="nodes of the job, by name: n3,n7")
    add("--hours", type=float, default=24.0, metavar="T", help="how long the job is (default: 24)")
    add("--json", action="store_true", help="JSON instead of words")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("hpcft risk needs scipy", "pip install 'hpcft[foresight]'")
    if not 0 < args.hours < 1e6:
        raise UsageError(f"--hours {args.hours:g}", "it is more than 0, and less than a million")
    if not 0 < args.since < 20 * 365.25 * 86400:
        raise UsageError("--since is 0, or more than 20 years", "write for instance --since 90d")
    named = [name for name in (args.on or "").split(",") if name]
    if args.nodes is not None and args.nodes < max(1, len(named)):
        raise UsageError(
            f"--nodes {args.nodes}", f"it is {max(1, len(named))} or more, or leave it away"
        )
    from hpcft.foresight import aging, evidence, rates, signals

    with Console(stderr=True).status("reading ...") as status:
        gathered = _gather(args, status.update)
        status.update("computing ...")
        records = evidence.records(gathered.stretches)
        base = rates.estimate([record.seen for record in records], gathered.jobs)
        times = [time for record in records for time in record.times]
        age = aging.fit(times) if times else None
        factors = signals.factors(gathered.signs)
        now = base.raised(factors) if factors else base
    nodes = args.nodes or len(named) or max(1, len(records))
    # Where the job is to run is not known, unless it is said; then signs of trouble count.
    whole = nodes == len(records) and not args.nodes and not named
    chances = now.job(nodes, args.hours, [r.node for r in records] if whole else named)
    if args.json:
        print(json.dumps(_as_json(gathered, records, now, age, chances, factors)))
    else:
        _tell(gathered, records, now, age, chances, factors)
    return 0


def _gather(args: argparse.Namespace, tell: Callable[[str], None]) -> _Gathered:
    from hpcft.foresight.rates import Seen

    found: list[Stretch] = []
    sources: list[str] = []
    signs: list[Sign] = []
    found += _of_runs(args.runs, sources, signs, tell)
    found += _of_history(args, sources)
    jobs = None
    if not args.no_slurm:
        tell("asking Slurm ...")
        own, jobs_told = _of_slurm(args.since, sources, signs)
        found += own
        if jobs_told and not own:
            jobs = Seen("", jobs_told.failed, jobs_told.node_hours)
    found = [stretch for stretch in found if stretch.hours > 0 or stretch.failed]
    if not args.no_live:
        from hpcft.foresight import signals

        signs += signals.here(socket.gethostname(), oom_kills())
    return _Gathered(found, sources, signs, jobs)


def _of_runs(
    names: list[str], sources: list[str], signs: list[Sign], tell: Callable[[str], None]
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
    from hpcft.foresight import evidence, signals

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


def _of_history(args: argparse.Namespace, sources: list[str]) -> list[Stretch]:
    path = args.history or (Path(os.environ[uptime.HISTORY]) if _named() else None)
    if path is None:
        sources.append(f"no history: neither --history nor {uptime.HISTORY} names one")
        return []
    try:
        lines = list(uptime.read(path))
    except FileNotFoundError:
        if args.history:
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
    from hpcft.foresight import evidence
    from hpcft.foresight.signals import Sign

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


def _between(rate: Interval, factor: float, unit: str) -> str:
    of = rate.times(factor)
    return f"{of.mean:.3g} {unit} ({of.low:.2g} to {of.high:.2g})"


def _percent(chance: Interval) -> str:
    of = chance.times(100)
    return f"{of.mean:.2f} % ({of.low:.2f} to {of.high:.2f})"


def _tell(
    gathered: _Gathered,
    records: list[Record],
    rates: Rates,
    age: Aging | None,
    chances: Chances,
    factors: dict[str, float],
) -> None:
    hours = sum(record.hours for record in records)
    failures = sum(record.failures for record in records)
    say("What there is to go by:")
    for source in gathered.sources:
        say(f"    {source}")
    say(
        f"    together {failures} failures in {hours:,.1f} node-hours of {len(records)} nodes "
        "(what a script or somebody outside has caused is not counted)"
    )
    if hours + (gathered.jobs.hours if gathered.jobs else 0) < 1000:
        say("    That is little: what follows is mostly what published machines say.")
    node = rates.node
    say(f"\nA node fails          {_between(node, 1000, 'times in 1000 hours')}")
    mtbf = duration(3600 / node.mean)
    span = f"{duration(3600 / node.high)} to {duration(3600 / node.low)}"
    say(f"    or once in {mtbf}, with 90 % probability in {span}")
    if age:
        shape = age.shape
        say(f"    {age.verdict}")
        say(
            f"    (Weibull shape {shape.mean:.2f}, {shape.low:.2f} to {shape.high:.2f}; "
            f"{age.failures} times ended in a failure, {age.censored} did not)"
        )
    low, high = chances.between
    say(f"\nA job of {chances.nodes:,} nodes for {chances.hours:g} hours:")
    say(f"    meets {_between(chances.expected, 1, 'failures')}; in 9 of 10 cases {low} to {high}")
    say(f"    at least one with probability {_percent(chances.any_)}")
    for number in range(4):
        say(f"    exactly {number}: {_percent(chances.exactly(number))}")
    say("")
    _tell_nodes(records, rates, factors)
    if gathered.signs:
        say("\nSigns of trouble now:")
        for sign in gathered.signs:
            word = "not known" if sign.there is None else "no"
            if sign.there:
                word = f"YES, its rate is taken {sign.factor:g} times"
            say(f"    {sign.node}: {sign.said}: {word}")


def _tell_nodes(records: list[Record], rates: Rates, factors: dict[str, float]) -> None:
    if not rates.nodes:
        return
    by_name = {record.node: record for record in records}
    shown = rates.nodes[:20]
    evidence = []
    for one in shown:
        record = by_name.get(one.seen.node)
        causes = (
            [f"{cause} x{n}" if n > 1 else cause for cause, n in record.causes] if record else []
        )
        if one.seen.node in factors:
            causes.append(f"signs of trouble: x{factors[one.seen.node]:g}")
        if one.stands_out:
            causes.insert(0, "STANDS OUT")
        evidence.append("; ".join(causes) or "no failure")
    say(
        table(
            [
                Column("node", [one.seen.node for one in shown]),
                Column("failures", [str(one.seen.failures) for one in shown]),
                Column("hours", [f"{one.seen.hours:,.1f}" for one in shown]),
                Column("in 1000 hours", [_between(one.rate, 1000, "") for one in shown]),
                Column("evidence", evidence, 1),
            ]
        )
    )
    if len(rates.nodes) > len(shown):
        say(f"and {len(rates.nodes) - len(shown)} nodes with lower rates")


def _as_json(
    gathered: _Gathered,
    records: list[Record],
    rates: Rates,
    age: Aging | None,
    chances: Chances,
    factors: dict[str, float],
) -> dict[str, Any]:
    by_name = {record.node: record for record in records}
    return {
        "sources": gathered.sources,
        "node": asdict(rates.node),
        "failures": sum(record.failures for record in records),
        "node_hours": sum(record.hours for record in records),
        "aging": asdict(age) if age else None,
        "job": {
            "nodes": chances.nodes,
            "hours": chances.hours,
            "expected": asdict(chances.expected),
            "between": chances.between,
            "any": asdict(chances.any_),
            "exactly": [asdict(chances.exactly(number)) for number in range(11)],
        },
        "nodes": [
            {
                **asdict(one.seen),
                "rate": asdict(one.rate),
                "bad": one.bad,
                "stands_out": one.stands_out,
                "factor": factors.get(one.seen.node, 1.0),
                "causes": dict(by_name[one.seen.node].causes) if one.seen.node in by_name else {},
                "spared": dict(by_name[one.seen.node].spared) if one.seen.node in by_name else {},
            }
            for one in rates.nodes
        ],
        "signs": [asdict(sign) | {"factor": sign.factor} for sign in gathered.signs],
    }
