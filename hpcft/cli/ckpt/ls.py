"""``hpcft ckpt ls``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from hpcft.cli.ckpt import targets
from hpcft.cli.output import amount, print_json, say

SUMMARY = "list the checkpoints in a directory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("directory", type=Path, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code: 1 if one is damaged."""
    from hpcft.ckpt.index import Damaged
    from hpcft.ckpt.reader import leaves, opened

    rows: list[dict[str, Any]] = []
    for checkpoint in targets.store(args.directory).committed():
        row: dict[str, Any] = {"step": checkpoint.step, "path": str(checkpoint.path)}
        try:
            with opened(checkpoint.state) as found:
                count = len(leaves(found.index))
                row |= {"bytes": found.index.size, "leaves": count, "damage": None}
        except (Damaged, OSError) as error:
            why = str(error).removeprefix(f"{checkpoint.state}: ")
            row |= {"bytes": None, "leaves": None, "damage": why}
        # The file's time: the directory may be that of an earlier checkpoint, used again.
        dated = checkpoint.state if checkpoint.state.exists() else checkpoint.path
        row["saved"] = dated.stat().st_mtime
        row["metrics"] = checkpoint.metrics
        rows.append(row)
    if args.json:
        print_json(rows)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
        table = Table("step", "saved", "size", "leaves", *names, "name", "")
        for row in rows:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved"]))
            size = amount(row["bytes"]) if row["bytes"] is not None else "?"
            name = Path(row["path"]).name
            damage = row["damage"] or ""
            said = (f"{row['metrics'][n]:.6g}" if n in row["metrics"] else "" for n in names)
            step, many = str(row["step"]), str(row["leaves"] or "?")
            table.add_row(step, saved, size, many, *said, name, damage)
        say(table if rows else f"there is no checkpoint in {args.directory}")
    return int(any(row["damage"] for row in rows))
