"""``hpcft ckpt verify``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcft.cli.ckpt import targets
from hpcft.cli.output import bar, print_json, say

if TYPE_CHECKING:
    from hpcft.ckpt._engine import Engine

SUMMARY = "read checkpoints and check every checksum"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("checkpoint", type=Path, nargs="+", metavar="CHECKPOINT|DIR")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code: 1 if something is damaged."""
    from hpcft.ckpt._engine import Engine

    engine = Engine(targets.MEMORY)
    failed = False
    for file in [file for target in args.checkpoint for file in targets.files(target)]:
        said, where = examine(file, engine, not args.json)
        failed = failed or not said["ok"]
        if args.json:
            print_json([said])
        elif said["ok"]:
            say(f"good: {file}")
        else:
            say(f"DAMAGED: {file}: {said.get('why') or where}")
    return int(failed)


def examine(file: Path, engine: Engine, shown: bool) -> tuple[dict[str, Any], str]:
    """Whether a checkpoint is good, for scripts; and where it is damaged, for people.

    Parameters
    ----------
    shown: how far it is, at a terminal.
    """
    from hpcft.ckpt.index import Damaged
    from hpcft.ckpt.reader import leaves, opened, read, told

    said: dict[str, Any] = {"path": str(file), "ok": True, "damaged": [], "files": []}
    where = ""
    try:
        with opened(file) as found, bar(str(file), shown) as advance:
            total = sum(found.index.specs[i].nbytes for i in leaves(found.index))
            watch = _watched(advance, total)
            bad = read(found, engine, lambda _: None, watch)
            said |= {"damaged": bad.leaves, "files": bad.files}
            where = told(found.index, bad)
            said["step"] = found.step
    except (Damaged, OSError) as error:
        said |= {"ok": False, "why": str(error).removeprefix(f"{file}: ")}
    said["ok"] = said["ok"] and not said["damaged"]
    return said, where


def _watched(advance: Callable[[int, int], None], total: int) -> Callable[[Any], None]:
    """Waits for transfers, one after the other, and shows how far all are."""
    before = 0

    def watch(transfer: Any) -> None:
        nonlocal before
        while not transfer.wait(0.1):
            advance(before + transfer.progress()[2], total)
        before += transfer.progress()[2]

    return watch
