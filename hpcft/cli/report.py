"""``hpcft report``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from hpcft.cli.output import write_whole
from hpcft.cli.runs import RUN, add_run, see
from hpcft.errors import HpcftError
from hpcft.watch.runs import find

SUMMARY = "write a page that shows what a training was: its story, goodput, timeline, stragglers"

DESCRIPTION = f"""\
Write a page on a training that has ended, in whatever way, or still runs: what happened and what it
cost, where its time went, who played which rank when, the curves of its metrics, and which ranks
are slower than the others. The page is one file that needs nothing else, also to be sent to others.

    hpcft report RUN                      writes RUN/report.html
    hpcft report RUN --output -           to stdout
    hpcft report RUN --json               the same content as JSON, to stdout
    hpcft report RUN --json | jq .goodput.part

Of a job that Slurm has restarted name the last run directory, or the job: those before it are a
part of the report.

{RUN}"""

_EPILOG = """\
exit code: 0 it is written; 1 the run cannot be read, or the page not be written; 2 there is no such
run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write it; - is stdout (default: report.html in the run directory; with "
        "--json stdout)",
    )
    add("--json", action="store_true", help="JSON instead of a page")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    # What draws pages takes its time to be loaded, which the other commands need not spend.
    from hpcft.report import page, story
    from hpcft.report.record import Status

    run = find(args.run_name)
    with Console(stderr=True).status("reading ..."):
        view = see(run)
        # Without an entry a view takes the first event for the begin.
        begun = view.begun if run.entry else None
        status = Status(view.name, view.state, view.ended, view.reason, view.step, begun, view.time)
        path = run.rundir.path
        try:
            told = story.tell(path, status)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise HpcftError(f"{path} cannot be read: {error}") from error
        text = json.dumps(told.as_json()) + "\n" if args.json else page.draw(told)
    output = args.output or (Path("-") if args.json else run.rundir.report_file)
    if str(output) == "-":
        sys.stdout.write(text)
        return 0
    write_whole(output, text, "name another place with --output")
    print(output)
    return 0
