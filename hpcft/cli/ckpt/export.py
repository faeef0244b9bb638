"""``hpcft ckpt export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hpcft.cli.ckpt import targets
from hpcft.cli.output import amount, bar, print_json, say
from hpcft.errors import UsageError
from hpcft.launch.options import size

SUMMARY = "write a checkpoint in another format"

DESCRIPTION = """\
Write a checkpoint in another format. It is there as a whole, or not at all.

    hpcft ckpt export DIR model.safetensors --format safetensors
        the tensors of the modules, by the names their state dicts have: layers.0.weight;
        plain values go into the metadata, and the rest (optimizers, samplers) is left out
    hpcft ckpt export DIR model/ --format safetensors --max-shard-size 2G
        a directory as Hugging Face's libraries read it
    hpcft ckpt export DIR --step 500 dcp/ --format dcp
        the whole state for torch.distributed.checkpoint: dcp.load({"model": ..., ...}),
        or dcp_to_torch_save

Every leaf is checked on the way, and one at a time is in memory.
"""

_LARGEST = "5G"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="DIR|CHECKPOINT", help="of a directory the newest")
    add("target", type=Path, metavar="TARGET", help="what to write")
    add("--format", choices=("safetensors", "dcp"), required=True)
    add("--step", type=int, metavar="N", help="of a directory the checkpoint of this step")
    add(
        "--part",
        action="append",
        default=[],
        metavar="NAME",
        help="safetensors: this part's tensors, may be given again (default: the modules). Of "
        "several parts, names begin with the part's",
    )
    add(
        "--max-shard-size",
        metavar="SIZE",
        help=f"safetensors: bytes of a file, if TARGET is a directory (default {_LARGEST})",
    )
    add("--force", action="store_true", help="replace what another export has written")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    largest = _largest(args)
    file = targets.file(args.checkpoint, args.step)

    from hpcft.ckpt._engine import Engine
    from hpcft.ckpt.convert import dcp, safetensors_files
    from hpcft.ckpt.convert.leaves import Leaves
    from hpcft.ckpt.reader import opened

    said: dict[str, Any] = {"path": str(args.target), "format": args.format, "left_out": []}
    with opened(file) as checkpoint, bar(str(args.target), not args.json) as advance:
        leaves = Leaves(checkpoint, Engine(targets.MEMORY), advance)
        if args.format == "dcp":
            files = dcp.write(leaves, args.target, args.force)
        else:
            chosen = safetensors_files.choose(leaves, args.part)
            files = safetensors_files.write(leaves, chosen, args.target, args.force, largest)
            said["left_out"] = chosen.left_out
        said |= {"step": leaves.step, "bytes": leaves.total, "files": list(map(str, files))}
    if args.json:
        print_json([said])
        return 0
    say(f"exported step {said['step']} to {args.target}: {amount(said['bytes'])}")
    if said["left_out"]:
        say(f"left out, as safetensors holds tensors only: {', '.join(said['left_out'])}")
    return 0


def _largest(args: argparse.Namespace) -> int:
    given = args.max_shard_size
    if args.format == "dcp" and (given or args.part):
        raise UsageError("--part and --max-shard-size are of safetensors", "leave them away")
    if given and args.target.suffix == ".safetensors":
        raise UsageError("--max-shard-size is for several files", "name a directory as TARGET")
    number = size("--max-shard-size", given or _LARGEST)
    if number < 1:
        raise UsageError(f"--max-shard-size {given} makes no sense", "give 1 or more")
    return number
