"""``hpcft ckpt prune``."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from hpcft.ckpt.lock import locked
from hpcft.ckpt.policy import BEST, Best, Retention
from hpcft.cli.ckpt import targets
from hpcft.cli.output import print_json, say
from hpcft.errors import UsageError

SUMMARY = "remove the older checkpoints of a directory"

DESCRIPTION = """\
Remove the older checkpoints of DIR, but for those to be kept. While a run saves to DIR, which
removes them itself as its --ckpt-keep says, this is refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--keep", type=int, required=True, metavar="K", help="the newest K stay")
    parser.add_argument(
        "--keep-nth", type=int, default=0, metavar="N", help="and those of steps that N divides"
    )
    parser.add_argument("--keep-best", metavar="METRIC[:max][:K]", help=f"and {BEST}")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    if args.keep < 1:
        raise UsageError(f"--keep {args.keep} would remove them all", "give 1 or more")
    if args.keep_nth < 0:
        raise UsageError(f"--keep-nth {args.keep_nth} makes no sense", "give 0 or more")
    best = None if args.keep_best is None else Best.parse(args.keep_best)
    store = targets.store(args.directory)
    with nullcontext() if args.dry_run else locked(args.directory, "hpcft ckpt prune"):
        old = Retention(args.keep, args.keep_nth, best).surplus(store.committed())
        for checkpoint in old:
            if not args.dry_run:
                store.remove(checkpoint)
            if args.json:
                print_json([{"removed": str(checkpoint.path), "step": checkpoint.step}])
            else:
                say(f"{'would remove' if args.dry_run else 'removed'} {checkpoint.path}")
    if not old and not args.json:
        say("there is nothing to remove")
    return 0
