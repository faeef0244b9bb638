"""``hpcft plan``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpcft.ckpt import interval
from hpcft.cli import quantities
from hpcft.cli.output import Column, say, table, write_whole
from hpcft.cli.prediction import between_failures, require_scipy
from hpcft.cli.runs import RUN, see
from hpcft.errors import HpcftError, UsageError
from hpcft.foresight.scenario import (
    DAY,
    SHORT,
    Hazards,
    Machine,
    Saves,
    Scenario,
    Site,
    Stack,
    Tier,
)
from hpcft.report.amounts import duration
from hpcft.watch.runs import find

if TYPE_CHECKING:
    from hpcft.foresight.forecast import Forecast, Mean
    from hpcft.foresight.trace import Strike
    from hpcft.report.record import Chapter
    from hpcft.report.story import Story

SUMMARY = "simulate a campaign: how many spares, how often to save, what goodput, what cost"

DESCRIPTION = f"""\
Play a training campaign through, many times over, with the failures that are to be expected of its
nodes, and say what comes of it: goodput, where the time goes, how often to save, what it costs.

    hpcft plan --nodes 512 --days 30                            with the defaults
    hpcft plan --nodes 4096 --ranks-per-node 4 --days 60 --mtbf-node 50y --spares 16
    hpcft plan --nodes 512 --mtbf-node 150d --sweep spares=0..16    how many spares?
    hpcft plan --nodes 512 --sharded --near-every 1m            state sharded, kept near the ranks
    hpcft plan --nodes 512 --restart --relaunch 10m             without recovery in place
    hpcft plan --nodes 512 --risk                               as often as your nodes have failed
    hpcft plan --from RUN --nodes 512                           with the times that RUN has measured
    hpcft plan --trace RUN --spares 2                           RUN's failures, another setting
    hpcft plan --nodes 512 --sweep ckpt-every=1m..4h --plot plan.html
    hpcft plan --validate                                       against published campaigns

Times are written 90s, 10m, 1.5h, 3d, 50y, or never. What each default is taken from, and how good
the simulator is: docs/foresight.md. How often your nodes really fail: hpcft risk.

{RUN}"""

_EPILOG = """\
exit code: 0 done; 1 the page cannot be written, or the run not be read; 2 wrong usage
"""

#: Times Daly's optimum, the intervals among which the best is looked for; further ones are tried
#: as long as the longest is the best.
_GRID, _LONGER = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0), (8.0, 16.0, 32.0, 64.0)


def _count(text: str) -> int:
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError("nan is no number")
    return value


_TIME = quantities.seconds


@dataclass(frozen=True)
class _Option:
    """An option that is a number, and so can be swept over.

    field: which of the part of a scenario that its group describes; empty: none of these.
    help: what it is, without the default.
    default: None: the part's own, and where that has none the option has to be given.
    """

    name: str
    field: str
    kind: Callable[[str], float]
    help: str
    default: float | None = None

    @property
    def place(self) -> str:
        """What it is called among the parsed options, and among what a run has measured."""
        return self.name.replace("-", "_")

    def write(self, value: float) -> str:
        """A value of it, for people."""
        if self.kind is not _TIME:
            return f"{value:g}"
        return "never" if math.isinf(value) else duration(value)


@dataclass(frozen=True)
class _Group:
    """Options that describe a part of a scenario."""

    title: str
    part: type
    options: tuple[_Option, ...]

    def default(self, option: _Option) -> float | None:
        """None if it has to be given."""
        if option.default is not None:
            return option.default
        own = {one.name: one.default for one in fields(self.part)}.get(option.field, MISSING)
        return None if own is MISSING else own

    def of(self, given: dict[str, float]) -> Any:
        """The part."""
        own = (one for one in self.options if one.field)
        return self.part(**{o.field: _whole(o, given[o.name]) for o in own})


def _whole(option: _Option, value: float) -> float:
    return int(value) if option.kind is _count else value


_FILE = Saves().file or Tier(600.0, 0.0)
_GROUPS = (
    _Group(
        "the machine",
        Machine,
        (
            _Option("nodes", "nodes", _count, "nodes that train"),
            _Option("spares", "spares", _count, "nodes that wait, besides"),
            _Option("ranks-per-node", "ranks_per_node", _count, "ranks on each"),
            _Option("rack-nodes", "rack", _count, "nodes that fail with their rack"),
            _Option("days", "", _number, "for how long the nodes are there", 30),
        ),
    ),
    _Group(
        "what befalls it (mean times between)",
        Hazards,
        (
            _Option("mtbf-node", "node", _TIME, "failures of one node"),
            _Option("mtbf-rack", "rack", _TIME, "failures of one rack"),
            _Option("mtbf-job", "job", _TIME, "failures of all ranks at once"),
            _Option("shape", "shape", _number, "Weibull's, of the failures; 1 is exponential"),
            _Option("slow-every", "slow", _TIME, "one node's turning slow"),
            _Option("slowdown", "slowdown", _number, "times as long as a step then takes"),
            _Option("slow-for", "slow_for", _TIME, "until it is fast again"),
            _Option("preempted", "preempted", _TIME, "preemptions"),
        ),
    ),
    _Group(
        "checkpoints in files",
        Tier,
        (
            _Option(
                "ckpt-every",
                "interval",
                _TIME,
                "training between two files; never: no files",
                _FILE.interval,
            ),
            _Option("ckpt-cost", "cost", _TIME, "for which one holds training up", _FILE.cost),
            _Option("ckpt-write", "write", _TIME, "until it is safe", _FILE.write),
            _Option("ckpt-restore", "restore", _TIME, "to read it", _FILE.restore),
        ),
    ),
    _Group(
        "checkpoints near the ranks",
        Tier,
        (
            _Option("near-every", "interval", _TIME, "training between two", math.inf),
            _Option("near-cost", "cost", _TIME, "for which one holds training up", 0.05),
            _Option("near-restore", "restore", _TIME, "to read it", 1.0),
            _Option("near-survives", "", _count, "nodes lost at once", Saves.near_survives),
        ),
    ),
    _Group(
        "the stack",
        Stack,
        (
            _Option("step", "step", _TIME, "a step of the training"),
            _Option("waiting", "waiting", _number, "part of it that waits for slower ranks"),
            _Option("detect", "detect", _TIME, "until a failure is known"),
            _Option("adopt", "adopt", _TIME, "until a spare has taken over"),
            _Option("shrink", "shrink", _TIME, "until the others go on with fewer"),
            _Option("relaunch", "relaunch", _TIME, "to start all ranks again"),
            _Option("resize", "resize", _TIME, "to take repaired nodes in"),
            _Option("start", "start", _TIME, "to start the job"),
            _Option("end", "end", _TIME, "to end it"),
            _Option("min-nodes", "at_least", _count, "fewer do not train on; 0: half of them"),
            _Option("group-nodes", "by", _count, "nodes that a shrink leaves out at once"),
        ),
    ),
    _Group(
        "the site",
        Site,
        (
            _Option("repair", "repair", _TIME, "until a failed node is back, mean"),
            _Option("soft", "soft", _number, "part of failures that a reboot mends"),
            _Option("reboot", "reboot", _TIME, "until a node is back that needs no more"),
            _Option("queue", "queue", _TIME, "wait in the queue, mean"),
            _Option("time-limit", "limit", _TIME, "of a job"),
            _Option("price", "price", _number, "of a node-hour"),
        ),
    ),
)
_OPTIONS = {option.name: option for group in _GROUPS for option in group.options}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    groups = {}
    for group in _GROUPS:
        groups[group.part] = added = parser.add_argument_group(group.title)
        for option in group.options:
            default = group.default(option)
            said = "" if default is None else f" (default: {option.write(default)})"
            metavar = "TIME" if option.kind is _TIME else "N"
            added.add_argument(
                f"--{option.name}", type=option.kind, metavar=metavar, help=option.help + said
            )
    groups[Hazards].add_argument(
        "--risk",
        action="store_true",
        help="nodes fail as often as they do by the record, which `hpcft risk` shows",
    )
    add = groups[Stack].add_argument
    add("--sharded", action="store_true", help="a lost rank's state is on no other rank")
    add(
        "--restart",
        action="store_true",
        help="no recovery in place: each failure ends all ranks, as without hpcft",
    )
    add(
        "--short",
        choices=SHORT,
        help="what is done without a spare: go on with fewer, wait for a repair, or give the nodes "
        "back and queue (default: shrink; with --restart wait)",
    )
    add("--no-rejoin", action="store_true", help="repaired nodes do not come back into the run")
    add = parser.add_argument
    add("--from", dest="source", metavar="RUN", help="take sizes and times that RUN has measured")
    add(
        "--trace",
        metavar="RUN",
        help="the failures that RUN has had, when it had them, in place of any drawn at random; "
        "and its length, sizes and times as by --from RUN, where nothing else is said",
    )
    add(
        "--sweep",
        metavar="NAME=VALUES",
        help="the forecast for several values of an option: spares=0..64, ckpt-every=1m,10m,1h",
    )
    add("--runs", type=int, default=32, metavar="N", help="lives to play through (default: 32)")
    add("--seed", type=int, default=0, metavar="N", help="of their luck (default: 0)")
    add("--plot", type=Path, metavar="FILE", help="write a page with pictures")
    add("--json", action="store_true", help="JSON instead of words")
    add("--validate", action="store_true", help="play published campaigns through")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    require_scipy("hpcft plan")
    if not 2 <= args.runs <= 100_000:
        raise UsageError(f"--runs {args.runs}", "it is from 2 to 100000")
    if args.seed < 0:
        raise UsageError(f"--seed {args.seed}", "it is 0 or more")
    if args.validate:
        return _validate(args)
    traced = _told(args.trace) if args.trace else None
    told = _told(args.source) if args.source else traced
    given = _given(args, told, traced)
    trace = None if traced is None else _trace(traced, int(given["ranks-per-node"]))
    scenario = _scenario(args, given).checked()
    swept = _swept(args, given)
    # What simulates takes its time to be loaded, which the other commands need not spend.
    from hpcft.foresight import forecast

    with Console(stderr=True).status("simulating ..."):
        found = forecast.simulate(scenario, args.runs, args.seed, trace)
        intervals = _intervals(args, scenario)
        rows = forecast.sweep(swept[1], swept[2], args.runs, args.seed, trace) if swept else []
    name = swept[0] if swept else ""
    if args.plot:
        from hpcft.foresight import page

        labels = [_OPTIONS[name].write(value) for value, _ in rows]
        tried, marks = (intervals.tried, intervals.marks) if intervals else ((), ())
        text = page.draw(found, tried, marks, name, labels, rows)
        write_whole(args.plot, text, "name another place with --plot")
    if args.json:
        print(json.dumps(_as_json(found, trace, intervals, name, rows)))
        return 0
    _tell(found, trace, intervals)
    if rows:
        _tell_sweep(name, rows)
    if args.plot:
        print(args.plot)
    return 0


@dataclass(frozen=True)
class _Told:
    """A run that is on record."""

    path: Path
    story: Story
    chapters: tuple[Chapter, ...]


def _told(name: str) -> _Told:
    from hpcft.report import record, story

    run = find(name)
    view = see(run)
    begun = view.begun if run.entry else None
    status = record.Status(
        view.name, view.state, view.ended, view.reason, view.step, begun, view.time
    )
    path = run.rundir.path
    try:
        read = record.read(path, status)
        return _Told(path, story.of_record(read), read.chapters)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HpcftError(f"{path} cannot be read: {error}") from error


def _given(args: argparse.Namespace, told: _Told | None, traced: _Told | None) -> dict[str, float]:
    """What holds: what is said, else what the run has measured, else the defaults."""
    from hpcft.foresight.measured import Measured, measure

    measured = measure(told.story, told.chapters) if told else Measured()
    if told and measured == Measured():
        raise HpcftError(
            f"{told.path} has nothing to tell: its training never began", "name another run"
        )
    if args.risk:
        if args.mtbf_node is not None or traced:
            raise UsageError(
                "--risk says how often nodes fail, as --mtbf-node and --trace do",
                "give one of these",
            )
        args.mtbf_node = between_failures()
    given: dict[str, float] = {}
    for group in _GROUPS:
        for option in group.options:
            value: float | None = getattr(args, option.place)
            if value is None:
                value = getattr(measured, option.place, None)
            if value is None and option.name == "days" and traced:
                value = traced.story.goodput.whole / DAY
            if value is None:
                value = group.default(option)
            if value is None:
                raise UsageError("how many nodes?", "say --nodes N, or --from RUN")
            given[option.name] = value
    if traced:
        given |= dict.fromkeys(("mtbf-node", "mtbf-rack", "mtbf-job"), math.inf)
    return given


def _trace(traced: _Told, ranks_per_node: int) -> tuple[Strike, ...]:
    from hpcft.foresight.trace import strikes

    return strikes(traced.chapters, ranks_per_node)


def _scenario(args: argparse.Namespace, given: dict[str, float]) -> Scenario:
    machine, hazards, file, near, stack, site = (group.of(given) for group in _GROUPS)
    tiers = [None if math.isinf(tier.interval) else tier for tier in (file, near)]
    saves = Saves(tiers[0], tiers[1], int(given["near-survives"]))
    stack = replace(
        stack,
        in_place=not args.restart,
        sharded=args.sharded,
        short=args.short or ("wait" if args.restart else "shrink"),
        rejoin=not args.no_rejoin,
    )
    return Scenario(machine, given["days"] * DAY, hazards, saves, stack, site)


def _swept(
    args: argparse.Namespace, given: dict[str, float]
) -> tuple[str, Callable[[float], Scenario], list[float]] | None:
    """What is swept over: its name, the scenario for a value, and the values."""
    if not args.sweep:
        return None
    name, sign, text = args.sweep.partition("=")
    option = _OPTIONS.get(name)
    if not sign or option is None:
        raise UsageError(
            f"--sweep {args.sweep} names no option that is a number",
            "write for instance --sweep spares=0..64",
        )
    try:
        values = quantities.values(text, option.kind, option.kind is _count)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise UsageError(
            f"--sweep {args.sweep} has no values of --{name} ({error})",
            "write for instance spares=0..64, or ckpt-every=1m,10m,1h",
        ) from error

    def vary(value: float) -> Scenario:
        return _scenario(args, given | {name: value})

    for value in values:
        vary(value).checked()
    return name, vary, values


@dataclass(frozen=True)
class Intervals:
    """Between files, in seconds: the closed forms' best, and the simulated forecasts.

    loss: between failures that go back to a file, by the given rates.
    """

    loss: float
    young: float
    daly: float
    best: float
    tried: tuple[tuple[float, Forecast], ...]

    @property
    def marks(self) -> tuple[tuple[float, str], ...]:
        """What to point out on a picture of them."""
        return (self.young, "Young"), (self.daly, "Daly"), (self.best, "the best simulated")


def _intervals(args: argparse.Namespace, scenario: Scenario) -> Intervals | None:
    """None where nothing is saved, nothing ever fails, or a save costs nothing."""
    from hpcft.foresight import forecast, optimum

    file = scenario.saves.file
    rate = scenario.failure_rate
    if file is None or not file.cost or not rate:
        return None
    loss = 1 / rate
    young, daly = optimum.young(file.cost, loss), interval.optimum(file.cost, loss)
    runs = max(2, args.runs // 2)

    def work(found: Forecast) -> float:
        return found.work.mean

    def look(factors: Sequence[float]) -> list[tuple[float, Forecast]]:
        values = [daly * factor for factor in factors]
        return forecast.sweep(
            lambda value: forecast.with_interval(scenario, value), values, runs, args.seed
        )

    tried = look(_GRID)
    for factor in _LONGER:
        if forecast.best(tried, work) < tried[-1][0] or daly * factor > scenario.seconds:
            break
        tried += look([factor])
    best = forecast.best(tried, work)
    return Intervals(loss, young, daly, best, tuple(tried))


def _validate(args: argparse.Namespace) -> int:
    from hpcft.foresight.campaigns import CAMPAIGNS, judge

    with Console(stderr=True).status("simulating ..."):
        verdicts = [judge(campaign, args.runs, args.seed) for campaign in CAMPAIGNS]
    if args.json:
        for verdict in verdicts:
            campaign = verdict.campaign
            row = {
                "campaign": campaign.name,
                "source": campaign.source,
                "published": campaign.published,
                "simulated": [verdict.worse.part.mean, verdict.better.part.mean],
                "difference": verdict.difference,
                "given": campaign.given,
                "assumed": campaign.assumed,
            }
            print(json.dumps(row))
        return 0
    columns = [
        Column("campaign", [v.campaign.name for v in verdicts]),
        Column("published", [_range(*v.campaign.published) for v in verdicts]),
        Column("simulated", [_range(v.worse.part.mean, v.better.part.mean) for v in verdicts]),
        Column("apart, points", [f"{100 * v.difference:+.1f}" for v in verdicts]),
    ]
    say(table(columns))
    for verdict in verdicts:
        campaign = verdict.campaign
        say(f"\n{campaign.name} ({campaign.source})")
        for word, inputs in (("published", campaign.given), ("assumed", campaign.assumed)):
            for one in inputs:
                say(f"    {word}: {one}")
    return 0


def _range(low: float, high: float) -> str:
    if high >= 1:
        return f"> {100 * low:.0f} %"
    return f"{100 * low:.1f} %" if high - low < 5e-4 else f"{100 * low:.1f} to {100 * high:.1f} %"


def _share(mean: Mean) -> str:
    return f"{100 * mean.mean:.2f} % (+- {100 * mean.margin:.2f})"


def _tell(found: Forecast, trace: tuple[Strike, ...] | None, intervals: Intervals | None) -> None:
    from hpcft.report.words import PARTS

    scenario = found.scenario
    machine = scenario.machine
    ranks = machine.nodes * machine.ranks_per_node
    say(
        f"{ranks:,} ranks on {machine.nodes:,} nodes and {machine.spares:,} spare nodes, "
        f"{scenario.seconds / 86400:g} days, {found.runs} lives"
    )
    if trace is not None:
        say(f"the failures           {len(trace)} of the run that was named, when it had them")
    elif math.isfinite(scenario.hazards.node):
        say(f"a node fails           once in {duration(scenario.hazards.node)}, in the mean")
    low, high = (100 * end for end in found.between)
    say(f"goodput                {_share(found.part)}: the time that goes into steps that count")
    say(f"in 9 of 10 lives       from {low:.2f} to {high:.2f} %")
    say(f"work done              {_share(found.work)}: of what these nodes do when nothing fails")
    say(f"in 19 of 20 lives      at least {100 * found.worst:.2f} %")
    say(f"of what is paid for    {100 * found.yield_:.2f} %, spares included")
    counts = found.counts
    say(
        f"failures               {counts['failures']:.1f} of what trains, "
        f"{counts['spare_failures']:.1f} of spares; a spare took over {counts['adopted']:.1f} "
        f"times, {counts['shrunk']:.1f} times the others went on with fewer, "
        f"{counts['relaunched']:.1f} times all were started again, {counts['queued']:.1f} times "
        "the job had to queue"
    )
    if found.short.mean > 0:
        say(
            f"short of nodes         {100 * found.short.mean:.2f} % of the time; "
            f"at the worst {found.least:,} trained"
        )
    whole = found.goodput.whole
    rest = [(s, name) for name, s in found.goodput.parts.items() if name != "steps" and s > 0]
    lost = [f"{PARTS[name][0]} {100 * s / whole:.2f} %" for s, name in sorted(rest, reverse=True)]
    say(f"the rest               {', '.join(lost) or 'nothing'}")
    if scenario.site.price:
        say(
            f"cost                   {found.cost:,.0f} for {found.node_hours:,.0f} node-hours; "
            f"{found.wasted:,.0f} of it for nothing"
        )
    if intervals:
        file = scenario.saves.file
        assert file is not None
        said = f"{duration(intervals.young)} by Young, {duration(intervals.daly)} by Daly"
        or_more = " or longer" if intervals.best == intervals.tried[-1][0] else ""
        say(
            f"save every             {duration(intervals.best)}{or_more}, the best simulated; "
            f"{said} (for them each failure, one in {duration(intervals.loss)}, goes back to a "
            f"file); now {duration(file.interval)}"
        )


def _tell_sweep(name: str, rows: list[tuple[float, Forecast]]) -> None:
    from hpcft.foresight.forecast import best

    found = [forecast for _, forecast in rows]
    priced = any(forecast.cost for forecast in found)
    columns = [
        Column(name, [_OPTIONS[name].write(value) for value, _ in rows]),
        Column("goodput", [_share(forecast.part) for forecast in found]),
        Column("work done", [_share(forecast.work) for forecast in found]),
        Column("of what is paid for", [f"{100 * one.yield_:.2f} %" for one in found]),
        Column("short of nodes", [f"{100 * one.short.mean:.2f} %" for one in found]),
    ]
    if priced:
        columns.append(Column("cost", [f"{one.cost:,.0f}" for one in found]))
    say(table(columns))
    most = best(rows, lambda one: one.work.mean)
    worth = best(rows, lambda one: one.yield_)
    say(
        f"most work: {name} {_OPTIONS[name].write(most)}; "
        f"most for what is paid: {name} {_OPTIONS[name].write(worth)}"
    )


def _as_json(
    found: Forecast,
    trace: tuple[Strike, ...] | None,
    intervals: Intervals | None,
    name: str,
    rows: list[tuple[float, Forecast]],
) -> dict[str, Any]:
    told: dict[str, Any] = {"scenario": _finite(asdict(found.scenario)), **found.as_json()}
    if trace is not None:
        told["trace"] = [asdict(strike) for strike in trace]
    if intervals:
        told["interval"] = {
            "young": intervals.young,
            "daly": intervals.daly,
            "best": intervals.best,
            "tried": [{"interval": value, **one.as_json()} for value, one in intervals.tried],
        }
    if rows:
        told["sweep"] = {
            "name": name,
            "forecasts": [{"value": _finite(value), **one.as_json()} for value, one in rows],
        }
    return told


def _finite(value: Any) -> Any:
    """JSON has no infinity: what never happens is null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isinf(value) else value
