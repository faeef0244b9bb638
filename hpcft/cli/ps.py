"""``hpcft ps``."""

from __future__ import annotations

import argparse

from rich.table import Table

from hpcft.cli.output import Column, print_json, say, table
from hpcft.cli.runs import RUN, as_json, metrics, rate, saved, see_all
from hpcft.report.amounts import duration
from hpcft.watch.runs import find, known
from hpcft.watch.view import View, sweep

SUMMARY = "which trainings run, where, and how far they are"

DESCRIPTION = f"""\
Show your trainings: those of this machine, and, where the home directory is shared, those of all
nodes and Slurm jobs.

    hpcft ps                     those that run
    hpcft ps --all               and those that have ended in the last seven days
    hpcft ps --json              a line of JSON a run, with all its ranks

{RUN}
Every run leaves a file in $XDG_STATE_HOME/hpcft/runs (~/.local/state/hpcft/runs) when it starts.
states: starting, training, queued (Slurm will start it again), silent (nobody can tell), ok,
interrupted (asked to end), failed, killed (without a last word), no answer (of its file system).
ranks: those that train + spares, and how many of these are cold, having given their memory back.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    add("names", nargs="*", metavar="RUN", help="only these")
    add("-a", "--all", action="store_true", help="also those that have ended")
    add("--json", action="store_true", help="print JSON, a line a run")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    runs = [find(name) for name in args.names] if args.names else known()
    views = []
    for run, view in zip(runs, see_all(runs), strict=True):
        if args.names or (not sweep(run, view) and (args.all or not view.ended)):
            views.append(view)
    if args.json:
        print_json([as_json(view) for view in views])
    elif views:
        say(_table(views))
    else:
        say("none of your trainings runs" + ("" if args.all else "; --all shows those that did"))
    return 0


def _table(views: list[View]) -> Table:
    return table(
        [
            Column("run", [view.name for view in views]),
            Column("state", [view.state for view in views]),
            Column("step", ["" if view.step is None else str(view.step) for view in views]),
            Column("steps/s", [rate(view) for view in views], 1),
            Column("ranks", [_size(view) for view in views], 2),
            Column("failures", [str(len(view.failures) or "") for view in views], 3),
            Column("checkpoint", [saved(view) for view in views], 4),
            Column("nodes", [_where(view) for view in views], 5),
            Column("for", [_age(view) for view in views], 6),
            Column("metrics", [metrics(view) for view in views], 7),
            Column("directory", [view.run_dir for view in views], 8),
        ]
    )


def _size(view: View) -> str:
    if not view.spares:
        return str(view.active or "")
    cold = sum(rank.cold for rank in view.ranks)
    return f"{view.active} + {view.spares}" + (f" ({cold} cold)" if cold else "")


def _where(view: View) -> str:
    hosts = view.hosts
    return " ".join(hosts) if len(hosts) <= 3 else f"{hosts[0]} and {len(hosts) - 1} more"


def _age(view: View) -> str:
    if view.seconds is not None:
        return duration(view.seconds)
    return "" if view.ended or view.begun is None else duration(view.time - view.begun)
