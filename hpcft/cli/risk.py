"""``hpcft risk``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpcft.cli import quantities
from hpcft.cli.output import Column, say, table
from hpcft.cli.prediction import require_scipy
from hpcft.cli.runs import RUN
from hpcft.errors import UsageError
from hpcft.report.amounts import duration
from hpcft.telemetry import uptime

if TYPE_CHECKING:
    from hpcft.foresight.aging import Aging
    from hpcft.foresight.evidence import Record
    from hpcft.foresight.gathering import Gathered
    from hpcft.foresight.rates import Chances, Interval, Rates

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

#: With which probability spares are to last.
_SURE = (0.9, 0.99)


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
    require_scipy("hpcft risk")
    if not 0 < args.hours < 1e6:
        raise UsageError(f"--hours {args.hours:g}", "it is more than 0, and less than a million")
    if not 0 < args.since < 20 * 365.25 * 86400:
        raise UsageError("--since is 0, or more than 20 years", "write for instance --since 90d")
    named = [name for name in (args.on or "").split(",") if name]
    if args.nodes is not None and args.nodes < max(1, len(named)):
        raise UsageError(
            f"--nodes {args.nodes}", f"it is {max(1, len(named))} or more, or leave it away"
        )
    from hpcft.foresight import aging, gathering

    with Console(stderr=True).status("reading ...") as status:
        since = None if args.no_slurm else args.since
        gathered = gathering.gather(
            status.update, args.runs, args.history, since, live=not args.no_live
        )
        status.update("computing ...")
        found = gathering.estimate(gathered)
        records, now, factors = found.records, found.rates, found.factors
        times = [time for record in records for time in record.times]
        age = aging.fit(times) if times else None
    nodes = args.nodes or len(named) or max(1, len(records))
    # Where the job is to run is not known, unless it is said; then signs of trouble count.
    whole = nodes == len(records) and not args.nodes and not named
    chances = now.job(nodes, args.hours, [r.node for r in records] if whole else named)
    if args.json:
        print(json.dumps(_as_json(gathered, records, now, age, chances, factors)))
    else:
        _tell(gathered, records, now, age, chances, factors)
    return 0


def _between(rate: Interval, factor: float, unit: str) -> str:
    of = rate.times(factor)
    return f"{of.mean:.3g} {unit} ({of.low:.2g} to {of.high:.2g})"


def _percent(chance: Interval) -> str:
    of = chance.times(100)
    return f"{of.mean:.2f} % ({of.low:.2f} to {of.high:.2f})"


def _tell(
    gathered: Gathered,
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
    enough, surely = (chances.at_most(probability) for probability in _SURE)
    say(
        f"    spare nodes that last if none is repaired: {enough} with probability "
        f"{100 * _SURE[0]:g} %, {surely} with {100 * _SURE[1]:g} %; what they are worth says "
        "hpcft plan --risk"
    )
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
    gathered: Gathered,
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
            "spares": {f"{sure:g}": chances.at_most(sure) for sure in _SURE},
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
