"""``hpcft ckpt top``."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table

from hpcft.cli.ckpt import targets
from hpcft.cli.output import amount, print_json, say
from hpcft.cli.screen import check_period, keep_showing
from hpcft.errors import UsageError
from hpcft.report.amounts import duration
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory

if TYPE_CHECKING:
    from hpcft.ckpt.watch import Aside, View

SUMMARY = "watch what happens in a directory of checkpoints"

DESCRIPTION = """\
Watch what happens in a directory of checkpoints, until q or Ctrl-C: what is being written, what is
committed, how old it is, how much room is left.

    hpcft ckpt top DIR                      here, or on any node that sees DIR
    hpcft ckpt top DIR --run RUNDIR         with what the run's log says of its saves
    hpcft ckpt top DIR --once --json        for scripts

Only names, sizes and times are looked at. Of a new file, blocks on the disk tell how far it is. One
that is written over an earlier checkpoint has all its blocks from the start: then it is only said
since when, and with --run how long saves usually take.
"""

_SHOWN = 8
_KINDS = ("checkpoint", "save failed", "save skipped", "restore", "damaged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR")
    add("--run", type=Path, metavar="RUNDIR", dest="run_dir", help="the run's directory")
    add("--every", type=float, default=1.0, metavar="SECONDS", help="between looks (default 1)")
    add("--once", action="store_true", help="look once; so it is anyway without a terminal")


def run(args: argparse.Namespace) -> int:
    """Do it, until q or Ctrl-C."""
    check_period(args.every)
    store = targets.store(args.directory)
    run_dir = RunDirectory(args.run_dir) if args.run_dir else None
    if run_dir and not run_dir.path.is_dir():
        raise UsageError(f"there is no directory {run_dir.path}", "name one of hpcft-runs")

    from hpcft.ckpt.watch import look

    def seen() -> tuple[View, list[Event]]:
        events = run_dir.events() if run_dir else []
        return look(store), [event for event in events if event.kind in _KINDS]

    if args.json:
        try:
            while True:
                print_json([_row(*seen())])
                if args.once:
                    return 0
                time.sleep(args.every)
        except KeyboardInterrupt:  # the way to end it
            return 0
    if args.once or not sys.stdout.isatty():
        say(_screen(args.directory, *seen()))
    else:
        keep_showing(lambda: _screen(args.directory, *seen()), args.every)
    return 0


def _row(view: View, events: list[Event]) -> dict[str, Any]:
    row = asdict(view)
    for found, aside in zip(row["aside"], view.aside, strict=True):
        found |= {"rate": aside.rate, "left_s": aside.left}
    row["usual_s"] = _usual(events)
    row["events"] = [asdict(event) for event in events[-_SHOWN:]]
    return row


def _usual(events: list[Event]) -> float | None:
    """Seconds that saves have taken, by the run's log; None if it has none."""
    took = [event.detail.get("seconds") for event in events if event.kind == "checkpoint"]
    known = [seconds for seconds in took[-5:] if isinstance(seconds, (int, float))]
    return statistics.median(known) if known else None


def _screen(directory: Path, view: View, events: list[Event]) -> RenderableType:
    held = sum(found.bytes or 0 for found in view.committed)
    head = Table.grid(padding=(0, 2))
    head.add_row(
        str(directory),
        f"{len(view.committed)} committed, {amount(held)}",
        f"{amount(view.free)} free of {amount(view.total)}",
        time.strftime("%H:%M:%S", time.localtime(view.time)),
    )
    aside = Table("aside", "size", "written", "", "rate", "left", "last write")
    for one in view.aside:
        aside.add_row(*_progress(one, view.time, _usual(events)))
    committed = Table("step", "saved", "age", "size", "name")
    for found in reversed(view.committed[-_SHOWN:]):
        committed.add_row(
            str(found.step),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.saved)),
            duration(view.time - found.saved),
            "?" if found.bytes is None else amount(found.bytes),
            found.name,
        )
    if len(view.committed) > _SHOWN:
        committed.add_row("", f"and {len(view.committed) - _SHOWN} older", "", "", "")
    log = Table("time", "step", "the run's log", "")
    for event in events[-_SHOWN:]:
        said = event.detail.get("why") or event.detail.get("path") or ""
        if event.kind == "checkpoint" and "seconds" in event.detail:
            said = f"in {duration(float(event.detail['seconds']))}"
        at = time.strftime("%H:%M:%S", time.localtime(event.time))
        log.add_row(at, str(event.step), event.kind, str(said))
    return Group(
        head,
        aside if view.aside else "nothing is being written",
        committed if view.committed else "nothing is committed",
        *([log] if events else []),
    )


def _progress(aside: Aside, now: float, usual: float | None) -> tuple[RenderableType, ...]:
    name, size = aside.name, amount(aside.bytes)
    if aside.last_write is None:
        return name, size, "waits to be used again", "", "", "", ""
    last = f"{duration(now - aside.last_write)} ago"
    if aside.written is None:
        for_ = f"for {duration(now - aside.begun)}"
        usually = f"usually {duration(usual)}" if usual is not None else ""
        return name, size, "over an earlier one", for_, "", usually, last
    share = ProgressBar(total=max(1, aside.bytes), completed=aside.written, width=20)
    rate = f"{amount(round(aside.rate))}/s" if aside.rate else "?"
    left = duration(aside.left) if aside.left is not None else "?"
    return name, size, amount(aside.written), share, rate, left, last
