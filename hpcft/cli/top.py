"""``hpcft top``."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpcft.cli.output import (
    Column,
    amount,
    print_json,
    say,
    table,
    terminal_size,
)
from hpcft.cli.runs import RUN, add_run, as_json, metrics, rate, saved, see
from hpcft.cli.screen import check_period, keep_showing
from hpcft.report.amounts import duration
from hpcft.watch.runs import find
from hpcft.watch.view import Rank, View

SUMMARY = "watch a training, rank by rank"

DESCRIPTION = f"""\
Watch a training until q or Ctrl-C: how fast it is, its newest checkpoint, what has failed and what
became of it, and every rank.

    hpcft top RUN                here, or on any node that sees the run directory
    hpcft top RUN --json         one look, for scripts; also without a terminal

{RUN}
What a rank does (computing, waiting for others, recovering, parked, stopped) is seen of those on
this host; nobody is disturbed by it. A rank is slow that computes lastingly longer than the others;
who waits for it is not. A spare is cold that has given its memory back where that was short, and
has to run its script before it can train.
"""

#: Failures shown, and lines that are not ranks.
_SHOWN, _OTHER_LINES = 5, 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add_run(parser)
    add = parser.add_argument
    add("--every", type=float, default=1.0, metavar="SECONDS", help="between looks (default 1)")
    add("--once", action="store_true", help="look once; so it is anyway without a terminal")
    add("--json", action="store_true", help="look once, and print JSON")


def run(args: argparse.Namespace) -> int:
    """Do it, until q or Ctrl-C."""
    check_period(args.every)
    run = find(args.run_name)
    first = see(run)
    if args.json:
        print_json([as_json(first)])
    elif args.once or first.ended or not sys.stdout.isatty():
        say(_picture(first))
    else:
        keep_showing(lambda: _picture(see(run)), args.every)
    return 0


def _picture(view: View) -> RenderableType:
    return Group(
        _head(view),
        *([_failures(view)] if view.failures else []),
        _ranks(view) if view.ranks else "no rank has come to its training yet",
    )


def _head(view: View) -> RenderableType:
    since = view.seconds
    if since is None and view.begun and not view.ended:
        since = view.time - view.begun
    first = [f"{view.name}: {view.state}", "" if view.step is None else f"step {view.step}"]
    speed = rate(view)
    first += [f"{speed} steps/s" if speed and not speed.startswith("none") else speed]
    first += [f"{view.active} ranks, {view.spares} spares" if view.active else ""]
    first += ["" if since is None else f"for {duration(since)}", metrics(view)]
    size = view.checkpoint.bytes if view.checkpoint else None
    checkpoint = saved(view) + (f", {amount(size)}" if size is not None else "")
    lines = ["   ".join(part for part in first if part)]
    if checkpoint:
        lines += [f"newest checkpoint: {checkpoint}"]
    elif view.checkpoints:
        lines += [f"no checkpoint yet in {view.checkpoints}"]
    lines += [view.reason] if view.reason else []
    at = time.strftime("%H:%M:%S", time.localtime(view.time))
    lines += [f"{view.run_dir}   {at}"]
    return Text("\n".join(lines), overflow="fold")


def _failures(view: View) -> RenderableType:
    shown = view.failures[-_SHOWN:]
    names = [
        "spare" if f["role"] == "spare" else ", ".join(map(str, f["ranks"])) or "?" for f in shown
    ]
    stalls = ["" if f["stall_s"] is None else f"{1000 * f['stall_s']:.0f} ms" for f in shown]
    made = table(
        [
            Column("failed", names),
            Column("step", [str(f["step"]) for f in shown]),
            Column("cause", [f["cause"] for f in shown]),
            Column("then", [f["action"] for f in shown], 1),
            Column("stall", stalls, 2),
        ]
    )
    if len(view.failures) > len(shown):
        made.caption = f"and {len(view.failures) - len(shown)} earlier"
    return made


def _ranks(view: View) -> Table:
    size = terminal_size()
    room = max(4, size[1] - _OTHER_LINES - len(view.failures[-_SHOWN:])) if size else 1 << 30
    # Where not all find room, those first to which something has happened.
    ranks = sorted(view.ranks, key=_unusual) if len(view.ranks) > room else view.ranks
    shown = ranks[:room]
    made = table(
        [
            Column("rank", ["" if rank.logical is None else str(rank.logical) for rank in shown]),
            Column("role", [rank.role for rank in shown]),
            Column("state", [_state(rank) for rank in shown]),
            Column("step", ["" if rank.step is None else str(rank.step) for rank in shown], 1),
            Column("host", [rank.host for rank in shown], 2),
            Column("pid", ["" if rank.pid is None else str(rank.pid) for rank in shown], 4),
            Column("log", [f"logs/rank-{rank.world}.log" for rank in shown], 3),
        ]
    )
    if len(view.ranks) > len(shown):
        made.caption = f"and {len(view.ranks) - len(shown)} more"
    return made


def _unusual(rank: Rank) -> bool:
    return rank.slow is None and rank.state in ("", "computing", "waiting", "parked")


def _state(rank: Rank) -> str:
    slow = "" if rank.slow is None else f"slow, {rank.slow:.2g} times as long as others"
    cold = "cold, for memory is short" if rank.cold else ""
    return "; ".join(part for part in (rank.state, cold, slow) if part)
