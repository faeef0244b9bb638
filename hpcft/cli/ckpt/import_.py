"""``hpcft ckpt import``."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpcft.cli.ckpt import targets
from hpcft.cli.output import bar, print_json, say
from hpcft.errors import UsageError

SUMMARY = "commit a file of another format as a checkpoint"

DESCRIPTION = """\
Commit what others have written as a checkpoint in DIR, which is made if it does not exist. No run
may be saving there meanwhile.

    hpcft ckpt import dcp/ DIR                  a directory of torch.distributed.checkpoint
    hpcft ckpt import state.pt DIR              of torch.save
    hpcft ckpt import model.safetensors DIR     a file, or a directory of them

Dicts at the top become parts by their names (model, optimizer...), tensors there become the part
that --part names, and other things there become values. A training goes on from it with
`hpcft run --ckpt-dir DIR` if these are just the parts that its hpcft.State tracks; weights alone
can be shown, compared and verified. Nothing in SOURCE is run: what is not tensors, arrays and
plain values is refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="a file or directory")
    add("directory", type=Path, metavar="DIR", help="of checkpoints")
    add(
        "--part",
        default="model",
        metavar="NAME",
        help="what tensors in no part belong to (default model)",
    )
    add(
        "--step",
        type=int,
        metavar="N",
        help="steps completed (default: what SOURCE says if hpcft has exported it, else 0)",
    )
    add(
        "--force",
        action="store_true",
        help="even if DIR has a checkpoint of this step; that stays, and this counts as newer",
    )


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.step is not None and not 0 <= args.step < 1 << 63:
        raise UsageError(f"--step {args.step} makes no sense", "give 0 or more")
    if args.part in ("", "values", "hpcft"):
        raise UsageError(f"no part can be called {args.part!r}", "choose another name")

    from hpcft.ckpt._engine import Engine
    from hpcft.ckpt.convert.importing import commit, opened
    from hpcft.ckpt.lock import locked
    from hpcft.ckpt.store import Store

    new = not args.directory.exists()
    store = Store(args.directory).create()
    try:
        with (
            locked(args.directory, "hpcft ckpt import"),
            bar(str(args.source), not args.json) as advance,
            opened(args.source, args.part, args.directory, advance) as found,
        ):
            step = found.step or 0 if args.step is None else args.step
            if not args.force and any(c.step == step for c in store.committed()):
                raise UsageError(
                    f"there is a checkpoint of step {step} in {args.directory}",
                    "give another --step, or add this one with --force",
                )
            made = commit(found, step, args.directory, Engine(targets.MEMORY), advance)
    finally:
        if new:
            with suppress(OSError):  # it is not empty: all went well
                args.directory.rmdir()
    newest = store.committed()[-1]
    said: dict[str, Any] = {
        "path": str(made.path),
        "step": step,
        "parts": found.parts,
        "optimizers": found.optimizers,
        "newest": newest == made,
    }
    if args.json:
        print_json([said])
        return 0
    parts = ", ".join(found.parts) or "nothing but values"
    say(f"imported to {made.path}: step {step}, with {parts}")
    if not found.optimizers:
        say(
            "There is no optimizer's state in it: a training that tracks one cannot start from it. "
            "To begin from weights alone, load them in the training script."
        )
    elif newest == made:
        say(
            f"hpcft run --ckpt-dir {args.directory} goes on from it, if the script's hpcft.State "
            f"tracks just {parts}"
        )
    if newest != made:
        say(f"A training starts from {newest.path}, whose step is later.")
    return 0
