"""``hpcft ckpt diff``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from hpcft.cli.ckpt import targets
from hpcft.cli.output import print_json, say

SUMMARY = "tell which leaves of two checkpoints differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code: 1 if they differ."""
    from hpcft.ckpt.reader import leaves, opened

    def known(target: Path) -> dict[str, tuple[Any, int]]:
        with opened(targets.file(target)) as found:
            index = found.index
            return {
                index.specs[i].path: (index.specs[i], index.checksums[i]) for i in leaves(index)
            }

    old, new = known(args.old), known(args.new)
    rows: list[dict[str, Any]] = []
    for path in sorted(old.keys() | new.keys()):
        if path not in old or path not in new:
            rows.append({"path": path, "what": "only in new" if path in new else "only in old"})
        elif old[path][0] != new[path][0]:
            rows.append({"path": path, "what": "another type or shape"})
        elif old[path][1] != new[path][1]:
            rows.append({"path": path, "what": "another content"})
    if args.json:
        print_json(rows)
    elif rows:
        table = Table("path", "difference")
        for row in rows:
            table.add_row(row["path"], row["what"])
        say(table)
    else:
        say("they hold the same")
    return int(bool(rows))
