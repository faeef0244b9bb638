"""``hpcft metrics``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from hpcft.cli.output import write_whole
from hpcft.cli.runs import RUN, add_run
from hpcft.errors import HpcftError, UsageError
from hpcft.telemetry.address import Address
from hpcft.watch.runs import Run, find

SUMMARY = "a training's figures, as Prometheus has them"

DESCRIPTION = f"""\
Print a training's figures in Prometheus's text format, made from its run directory: they are those
that `hpcft run --metrics-port` serves while it trains.

    hpcft metrics RUN                              print them
    hpcft metrics RUN --output FILE                write FILE, the old one or the new one at any
                                                   time, as node_exporter's textfile collector
                                                   needs it: FILE is to end in .prom
    hpcft metrics RUN --serve 9100                 serve them until Ctrl-C, from any host that
                                                   sees the run directory

{RUN}
See docs/metrics.md for what each figure is.
"""

_EPILOG = "exit code: 0; 1 the run cannot be read or FILE not be written; 2 there is no such run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add("--output", type=Path, metavar="FILE", help="write this file instead")
    add("--serve", metavar="[HOST:]PORT", help="serve them at http://HOST:PORT/metrics; 0: a free")
    add("--address", type=Path, metavar="FILE", help="with --serve: write where, as JSON, to FILE")
    add("--json", action="store_true", help="print JSON, a line a sample")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    # Prometheus's library takes its time to be loaded, which the other commands need not spend.
    from hpcft.cli.exposition import serve, text_of
    from hpcft.watch.metrics import RunCollector

    if args.serve is not None and (args.output or args.json):
        raise UsageError("--serve goes with neither --output nor --json", "leave one away")
    if args.address and args.serve is None:
        raise UsageError("--address says where --serve serves", "give both")
    run = find(args.run_name)
    collector = RunCollector(run.name, run.rundir)
    if args.serve is not None:
        return serve(collector, Address.parse("--serve", args.serve), args.address)
    with _readable(run):
        text = text_of(collector.read(), args.json)
    if args.output:
        write_whole(args.output, text)
    else:
        sys.stdout.write(text)
    return 0


@contextlib.contextmanager
def _readable(run: Run) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise HpcftError(f"{run.rundir.path} cannot be read: {error}") from error
