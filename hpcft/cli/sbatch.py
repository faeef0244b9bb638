"""``hpcft sbatch``."""

from __future__ import annotations

import argparse
import math
import re
import sys
from pathlib import Path

from rich.console import Console

from hpcft.cli.prediction import between_failures, require_scipy
from hpcft.errors import UsageError
from hpcft.launch.options import RunOptions, parse
from hpcft.slurm import cluster
from hpcft.slurm.batch import Wanted, warning_time, write
from hpcft.slurm.scontrol import seconds
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory

SUMMARY = "write a batch script that fits a training to this cluster"

#: Said in place of a number of spares.
_AUTO = "auto"

_DESCRIPTION = """\
Write a batch script for this cluster: its partition's limits, a rank a GPU, the PMIx that srun has,
and, with --ckpt-dir, a warning early enough to save and a requeue that goes on from there.

    hpcft sbatch --nodes 8 --spares 4 --time 4:00:00 --ckpt-dir checkpoints train.py > job.sh
    sbatch job.sh
    hpcft sbatch --nodes 64 --spares auto --time 1-0 --ckpt-dir checkpoints train.py

Options of hpcft.run go before the script, after --:
    hpcft sbatch --nodes 8 --time 1-0 --ckpt-dir checkpoints -- --ckpt-every 500 train.py --lr 0.1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.description = _DESCRIPTION
    parser.epilog = "exit code: 0; 2 if the cluster cannot have such a job, and why"
    add = parser.add_argument
    add("--nodes", type=int, required=True, metavar="N", help="nodes, those of spares included")
    add("--time", required=True, metavar="TIME", help="time limit, as sbatch takes it: 4:00:00")
    add(
        "--spares",
        type=_spares,
        metavar="S",
        help="ranks parked as spares, or auto: those of as many nodes as make the most of all of "
        "them, simulated with the failure rate of `hpcft risk` (default: those of a node)",
    )
    add(
        "--ranks-per-node",
        type=int,
        metavar="N",
        help="ranks on each node (default: one a GPU, or 1 where there are none)",
    )
    add("--partition", metavar="NAME", help="default: the cluster's")
    add("--account", metavar="NAME", help="default: yours")
    add("--job-name", metavar="NAME", help="default: that of the script")
    add("--ckpt-dir", type=Path, metavar="DIR", help="save here, and have the job requeued")
    add(
        "--signal",
        type=int,
        metavar="SEC",
        help="have Slurm warn so long before the time limit (default: what saves into --ckpt-dir "
        "have taken, by hpcft-runs/*/events.jsonl, twice, and a minute)",
    )
    add("target", nargs=argparse.REMAINDER, metavar="SCRIPT", help="and its arguments")


def run(args: argparse.Namespace) -> int:
    """Print the script; return the exit code."""
    words = args.target[1:] if args.target[:1] == ["--"] else args.target
    if not words:
        raise UsageError("there is no SCRIPT", "name one, or -- -m MODULE")
    limit = _seconds(args.time)
    for option, value, least in (
        ("--nodes", args.nodes, 1),
        ("--spares", None if args.spares == _AUTO else args.spares, 0),
        ("--ranks-per-node", args.ranks_per_node, 1),
        ("--signal", args.signal, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{option} {value} makes no sense", f"give {least} or more")
    # Also sees that the script exists, and that the options are right.
    checkpoints = ["--ckpt-dir", str(args.ckpt_dir)] if args.ckpt_dir else []
    options = parse([*checkpoints, *words])
    own = len(words) - len(options.target)
    there = cluster.partitions()
    if not there:
        raise UsageError("there is no Slurm here", "run this where sbatch and scontrol work")
    partition = cluster.choose(args.partition, there)
    if partition is None:
        asked = "a default partition" if args.partition is None else f"partition {args.partition}"
        names = ", ".join(p.name for p in there)
        raise UsageError(f"there is no {asked}", f"choose from {names} with --partition")
    mpi = cluster.pmix()
    if mpi is None:
        raise UsageError(
            "srun has no PMIx here (see `srun --mpi=list`)",
            "ask the site for a Slurm built with it",
        )
    spares, spares_why = args.spares, ""
    if spares == _AUTO:
        ranks = args.ranks_per_node or partition.gpus or 1
        spares, spares_why = _provided(args, options, ranks, limit)
    warning, why = args.signal, "as asked for"
    if warning is None and args.ckpt_dir:
        warning, why = warning_time(_events(), str(args.ckpt_dir.absolute()))
    wanted = Wanted(
        name=args.job_name or Path(options.target[0]).stem,
        nodes=args.nodes,
        seconds=limit,
        ranks_per_node=args.ranks_per_node,
        spares=spares,
        spares_why=spares_why,
        warning=warning,
        account=args.account,
        ckpt_dir=str(args.ckpt_dir) if args.ckpt_dir else None,
        options=tuple(words[:own]),
        target=tuple(words[own:]),
    )
    sys.stdout.write(write(wanted, partition, mpi, sys.executable, why))
    return 0


def _spares(text: str) -> int | str:
    return text if text == _AUTO else int(text)


def _provided(
    args: argparse.Namespace, options: RunOptions, ranks: int, limit: int
) -> tuple[int, str]:
    """How many ranks are to be spares, and why."""
    require_scipy("--spares auto")
    from hpcft.foresight.provision import provision

    between = between_failures()
    at_least = min(args.nodes, math.ceil(options.min_ranks / ranks))
    shrinks = "shrink" in options.on_failure
    requeued = args.ckpt_dir is not None
    with Console(stderr=True).status("simulating ..."):
        found = provision(args.nodes, ranks, limit, requeued, between, at_least, shrinks)
    return found.spares * ranks, found.why


def _seconds(text: str) -> int:
    """A time as sbatch takes it; a plain number is minutes, ``1-12`` a day and twelve hours."""
    if re.fullmatch(r"\d+", text):
        text = f"{text}:00"
    elif re.fullmatch(r"\d+-\d+", text):
        text += ":00:00"
    elif re.fullmatch(r"\d+-\d+:\d+", text):
        text += ":00"
    found = seconds(text)
    if not found:
        raise UsageError(f"--time {text} is no time", "give something like 4:00:00 or 2-12:00:00")
    return int(found)


def _events() -> list[Event]:
    folders = sorted(Path("hpcft-runs").glob("*/events.jsonl"))
    return [event for file in folders for event in RunDirectory(file.parent).events()]
