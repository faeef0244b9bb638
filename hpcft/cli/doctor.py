"""``hpcft doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from hpcft.launch.checks import Finding, Level, examine, host_name

SUMMARY = "check this machine, or the allocation it is in, and say what to do about what is wrong"

_DESCRIPTION = """\
Check whether hpcft can work here: Python, MPI with fault tolerance (really tried, with a rank
killed), Slurm, memory, filesystem, network.

    hpcft doctor                              this machine
    salloc -N4 hpcft doctor                   an allocation: also trains on its nodes, losing a rank
    srun --mpi=pmix -N4 hpcft doctor          each node of a step
"""

_COLOURS = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "31"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.description = _DESCRIPTION
    parser.epilog = "exit code: 0 if nothing has failed, 1 otherwise"
    parser.add_argument("--json", action="store_true", help="print JSON, a line a finding")
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("hpcft-runs"),
        metavar="DIR",
        help="where run directories are to be (default hpcft-runs)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the findings; return the exit code."""
    # One task speaks for its node.
    if os.environ.get("SLURM_LOCALID", "0") != "0" and "SLURM_STEP_ID" in os.environ:
        return 0
    several = int(os.environ.get("SLURM_STEP_NUM_NODES", "1")) > 1
    prefix = f"{host_name()}: " if several else ""
    failed = False
    for finding in examine(args.run_dir):
        failed = failed or finding.level is Level.FAIL
        if args.json:
            text = json.dumps({"host": host_name(), **dataclasses.asdict(finding)})
        else:
            text = "\n".join(prefix + line for line in _lines(finding))
        # In one write, so that the lines of several nodes do not mix.
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    return 1 if failed else 0


def _lines(finding: Finding) -> list[str]:
    mark = f"{finding.level.value:<4}"
    if sys.stdout.isatty():
        mark = f"\x1b[{_COLOURS[finding.level]}m{mark}\x1b[0m"
    lines = [f"{mark}  {finding.subject + ':':<14} {finding.text}"]
    if finding.remedy:
        lines.append(f"{'':4}  {'':<14} -> {finding.remedy}")
    return lines
