"""``hpcft stop``."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from hpcft.cli.output import print_json
from hpcft.cli.runs import RUN, add_run, as_json, see
from hpcft.errors import UsageError
from hpcft.report.amounts import duration
from hpcft.watch.ending import ask
from hpcft.watch.runs import Jobs, Run, find
from hpcft.watch.view import View

SUMMARY = "end a training in order"

DESCRIPTION = f"""\
End a training, and wait until all of it has ended. It is asked as its launcher is by SIGTERM; of a
Slurm step scancel asks all tasks. Whoever may signal the run may do so, from the host it was
started on, or, of a Slurm step, from anywhere in the cluster.

    hpcft stop RUN               in order: what it does at SIGTERM
    hpcft stop RUN --now         at once: asked twice, and killed if that does not help

{RUN}"""

_EPILOG = """\
exit code: 0 the run has ended, now or before; 1 it has not, or could not be asked; 2 there is no
such run, or wrong use; 130 Ctrl-C: it is asked to end, and nobody waits for that
"""

#: With --now: seconds until a run is asked again, and until it is killed.
_AGAIN, _KILL = 0.5, 20.0
_PERIOD = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add("--now", action="store_true", help="do not let it save anything first")
    add(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="wait for its end at most so long (default: as long as it takes)",
    )
    add("--json", action="store_true", help="print what the run was at its end as JSON")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    # So written that nan is refused as well.
    if args.timeout is not None and not args.timeout >= 0:
        raise UsageError(f"--timeout {args.timeout} makes no sense", "give 0 seconds or more")
    run = find(args.run_name)
    view = see(run)
    before = view.ended and not _there(run)
    if view.state == "queued":
        raise UsageError(
            f"{view.name} does not run, but waits in Slurm's queue", f"scancel {view.job}"
        )
    if not before:
        ask(run)
    ended = before or _wait(run, view, args.now, args.timeout)
    view = see(run)
    if args.json:
        print_json([as_json(view)])
    elif ended:
        saved = f"; newest checkpoint: step {view.checkpoint.step}" if view.checkpoint else ""
        why = f" ({view.reason})" if view.reason else ""
        been = "had ended before" if before else "has ended"
        print(f"{view.name} {been}: {view.state}{why}, step {view.step or 0}{saved}")
    else:
        print(f"hpcft: {view.name} has not ended yet: {view.state}", file=sys.stderr)
    return 0 if ended else 1


def _there(run: Run) -> bool:
    """Whether something of it is; a summary is written before the last process leaves."""
    return run.alive(Jobs([run])) is True


def _wait(run: Run, view: View, now: bool, timeout: float | None) -> bool:
    """Wait for the end, telling how far it is.

    Returns
    -------
    Whether it has come.
    """
    began = time.monotonic()
    deeds = [(_KILL, True), (_AGAIN, False)] if now else []
    # Asking Slurm is asking a server of many.
    period = 1.0 if view.job and run.entry and run.entry.step else _PERIOD
    console = Console(stderr=True, highlight=False, markup=False)
    with console.status("") as line:
        while not (view.ended and not _there(run)):
            waited = time.monotonic() - began
            if timeout is not None and waited >= timeout:
                return False
            line.update(f"{view.name} ends: step {view.step or 0}, {duration(waited)}")
            if deeds and waited >= deeds[-1][0]:
                ask(run, kill=deeds.pop()[1])
            time.sleep(period)
            view = see(run)
    return True
