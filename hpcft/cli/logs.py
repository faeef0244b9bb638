"""``hpcft logs``."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.cli.output import print_json
from hpcft.cli.runs import RUN, add_run, see
from hpcft.errors import UsageError
from hpcft.telemetry.rundir import RunDirectory
from hpcft.watch.runs import find
from hpcft.watch.view import View

SUMMARY = "what a training's ranks have printed"

DESCRIPTION = f"""\
Show the last lines of the ranks' logs, each under its rank's name.

    hpcft logs RUN                    the last ten lines of every process
    hpcft logs RUN --rank 2 -n all    all that has been printed as rank 2, also by who failed
    hpcft logs RUN --failed           the last lines of those that failed
    hpcft logs RUN -f                 and what they print from now on, until the run ends

{RUN}
"""

#: Lines shown of each log.
_LINES, _FAILED_LINES = 10, 40
#: Bytes from the end of a log in which its last lines are looked for, times the lines wanted.
_LINE_BYTES = 400
_PERIOD = 0.3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add_run(parser)
    add = parser.add_argument
    add("--rank", type=int, metavar="N", help="only of logical rank N, whoever plays or played it")
    add("--failed", action="store_true", help="only of processes that have failed")
    add("-f", "--follow", action="store_true", help="go on with what is added, until the run ends")
    add(
        "-n",
        "--lines",
        metavar="LINES",
        help=f"so many of each, or all (default {_LINES}; with --failed {_FAILED_LINES})",
    )
    add("--json", action="store_true", help="print JSON, a line each")


@dataclass
class _Log:
    """A process's log, read from the beginning, or from near the end.

    title: who that is, for people.
    world: its world rank.
    logical: its logical rank; None for a spare.
    """

    title: str
    world: int
    logical: int | None
    path: Path
    _offset: int = 0
    _torn: bytes = b""

    def last(self, count: int | None) -> list[str]:
        """The last lines there are; None: all. What comes later, :meth:`more` tells."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                begin = 0 if count is None else max(0, size - (count + 1) * _LINE_BYTES)
                while True:
                    file.seek(begin)
                    content = file.read(size - begin)
                    if count is None or not begin or content.count(b"\n") > count:
                        break
                    begin = max(0, begin - 2 * len(content))
        except OSError:
            return []
        self._offset = size
        lines = content.split(b"\n")
        self._torn = lines.pop()
        if begin:
            lines = lines[1:]
        return _text(lines if count is None else lines[len(lines) - min(count, len(lines)) :])

    def more(self) -> list[str]:
        """The lines that have been completed since."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset, self._torn = 0, b""  # a new run in the same directory
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        self._offset += len(content)
        *lines, self._torn = (self._torn + content).split(b"\n")
        return _text(lines)

    def rest(self) -> list[str]:
        """What has no end of line, when no more will come."""
        torn, self._torn = self._torn, b""
        return _text([torn]) if torn else []


def _text(lines: list[bytes]) -> list[str]:
    # Of a line that was written over, as progress bars do, what was seen last.
    return [line.decode(errors="replace").rstrip("\r").rpartition("\r")[2] for line in lines]


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    try:
        return _run(args)
    except BrokenPipeError:  # as of `head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace) -> int:
    wanted = _wanted(args)
    run = find(args.run_name)
    view = see(run)
    if args.rank is not None and all(rank.logical != args.rank for rank in view.ranks):
        raise UsageError(f"the run has no rank {args.rank}", "see hpcft top")
    logs: dict[int, _Log] = {}
    for log in _logs(view, args.rank, args.failed):
        logs[log.world] = log
        _show(log, log.last(wanted), args.json)
    if not logs and not args.follow:
        print("hpcft: no such process has a log", file=sys.stderr)
    while args.follow:
        if not view.ended:
            time.sleep(_PERIOD)
            view = see(run)
        for log in _logs(view, args.rank, args.failed):
            # Who it is may have changed, where it was read has not.
            known = logs.setdefault(log.world, log)
            known.title, known.logical = log.title, log.logical
        for log in logs.values():
            _show(log, log.more(), args.json)
        if view.ended:
            break
    for log in logs.values():
        _show(log, log.rest(), args.json)
    return 0


def _wanted(args: argparse.Namespace) -> int | None:
    text = args.lines
    if text is None:
        return _FAILED_LINES if args.failed else _LINES
    if text == "all":
        return None
    if not text.isdecimal():
        raise UsageError(f"-n {text} makes no sense", "give a number of lines, or all")
    return int(text)


def _logs(view: View, rank: int | None, failed: bool) -> Iterator[_Log]:
    rundir = RunDirectory(Path(view.run_dir))
    known = {one.world: one for one in view.ranks}
    for path in sorted((rundir.path / "logs").glob("rank-*.log"), key=_number):
        world = _number(path)
        one = known.get(world)
        logical = one.logical if one else None
        if rank is not None and logical != rank:
            continue
        if failed and not (one and one.role == "lost"):
            continue
        name = f"process {world}" if one is None else "spare" if logical is None else ""
        title = name or f"rank {logical}"
        if one and one.role == "lost":
            title += f" ({one.state})"
        elif logical is not None and logical != world:
            title += f" (was spare {world})"
        yield _Log(title, world, logical, path)


def _number(path: Path) -> int:
    found = re.fullmatch(r"rank-(\d+)\.log", path.name)
    return int(found[1]) if found else -1


def _show(log: _Log, lines: list[str], as_json: bool) -> None:
    if as_json:
        who = {"world": log.world, "rank": log.logical, "who": log.title}
        print_json([{**who, "line": line} for line in lines])
        return
    for line in lines:
        print(f"{log.title} | {line}", flush=True)
