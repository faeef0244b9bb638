"""``hpcft ckpt show``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from hpcft.cli.ckpt import targets
from hpcft.cli.output import amount, print_json, say

SUMMARY = "show what a checkpoint holds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--under", default="/", metavar="PATH", help="only leaves below this path")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from hpcft.ckpt.reader import leaves, opened

    below = "/" + args.under.strip("/")
    rows: list[dict[str, Any]] = []
    with opened(targets.file(args.checkpoint)) as found:
        content = found.index
        for i in leaves(content):
            spec = content.specs[i]
            if below in ("/", spec.path) or spec.path.startswith(f"{below}/"):
                rows.append(
                    {
                        "path": spec.path,
                        "kind": spec.kind,
                        "dtype": spec.dtype,
                        "shape": list(spec.shape),
                        "bytes": spec.nbytes,
                        "crc32c": content.checksums[i],
                        "pieces": [
                            {
                                "begin": piece.begin,
                                "bytes": piece.length,
                                "file": content.files[piece.file].name,
                                "offset": piece.offset,
                            }
                            for piece in content.pieces(i)
                        ],
                    }
                )
        step = found.step
    if args.json:
        print_json(rows)
    else:
        count = len(content.files)
        files = "one file" if count == 1 else f"{count} files"
        title = f"step {step}, layout {content.layout}: {files}, {amount(content.size)}"
        table = Table("path", "type", "shape", "size", title=title)
        for row in rows:
            plain = row["kind"] not in ("tensor", "ndarray")
            shape = "" if plain else " x ".join(map(str, row["shape"])) or "scalar"
            kind = row["kind"] if plain else row["dtype"]
            table.add_row(row["path"], kind, shape, amount(row["bytes"]))
        table.add_section()
        table.add_row(f"{len(rows)} leaves", "", "", amount(sum(row["bytes"] for row in rows)))
        say(table)
    return 0
