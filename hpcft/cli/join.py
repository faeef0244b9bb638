"""``hpcft join``."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from hpcft.cli.runs import RUN, add_run, see
from hpcft.errors import HpcftError, UsageError, shell_code
from hpcft.slurm import queue as slurm
from hpcft.watch.runs import Run, find

SUMMARY = "add workers to a training that runs"

DESCRIPTION = f"""\
Add workers to a training that runs with --ckpt-dir. At the end of a step all ranks are launched
anew, from what they have in memory: no step is lost. The new ones train, if --nproc MIN:MAX left
room for them or ranks were lost; else they are spares.

    hpcft join RUN                       one more rank on this machine
    hpcft join RUN --ranks 2             two
    hpcft join RUN --nodes n5,n6         one on each of these nodes of the run's Slurm job
    hpcft join RUN --nodes n5 --ranks 4  four on this one
    salloc -N2 hpcft join RUN            one on each node of another Slurm job, for as long as that
                                         lasts (sbatch --wrap "hpcft join RUN" does as well)

The command runs as long as its workers. Ctrl-C has them leave at the end of a step, twice at once;
`hpcft leave` does so from elsewhere.

{RUN}"""

_EPILOG = """\
exit code: that of the run; 0 also if the workers have left before its end; 2 there is no such run
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    add = parser.add_argument
    add("--ranks", type=int, default=1, metavar="N", help="ranks on each node (default 1)")
    add(
        "--nodes",
        metavar="LIST",
        help="of the Slurm job, as srun --nodelist takes them (default: all on which the run has "
        "no rank)",
    )
    add(
        "--job",
        metavar="ID",
        help="the Slurm job that the nodes belong to (default: the one this command is called in; "
        "outside of any, the run's)",
    )


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    if args.ranks < 1:
        raise UsageError(f"--ranks {args.ranks} makes no sense", "give 1 or more")
    run = find(args.run_name)
    view = see(run)
    if view.ended:
        raise UsageError(f"{view.name} has ended: {view.state}", "start it again")
    entry = run.entry
    if entry and entry.step:
        job = args.job or os.environ.get("SLURM_JOB_ID") or entry.job
        nodes = _nodes(run, job, args.nodes)
        count = args.ranks * len(nodes)
        return _follow([[*_srun(job, nodes, args.ranks), *_task(run, count)]])
    if args.nodes or args.job:
        option = "--nodes" if args.nodes else "--job"
        raise UsageError(f"{option} is for runs that srun has started", "leave it away")
    if entry and not entry.here:
        raise UsageError(
            f"{view.name} runs on {entry.host} alone, and not over the network",
            f"hpcft join {entry.run_dir} there, or start it with srun",
        )
    return _follow([_task(run, args.ranks)] * args.ranks)


def _task(run: Run, count: int) -> list[str]:
    """The command of each of so many."""
    party = secrets.token_hex(8)
    return [sys.executable, "-m", "hpcft.join", str(run.rundir.path), party, str(count)]


def _nodes(run: Run, job: str, nodes: str | None) -> list[str]:
    """Where ranks are to join."""
    allocated = slurm.nodes(job)
    if not allocated:
        raise HpcftError(f"Slurm does not say on which nodes job {job} runs")
    wanted = slurm.expand(nodes) if nodes else [*allocated]
    if strange := sorted(set(wanted) - set(allocated)):
        raise UsageError(
            f"{', '.join(strange)} does not belong to job {job}",
            "allocate it, and join from there: salloc --nodelist=... hpcft join ...; or name the "
            "job it belongs to with --job",
        )
    if not nodes:
        used = {entry["host"] for entry in run.rundir.ranks()}
        wanted = [node for node in allocated if node not in used]
    if not wanted:
        raise UsageError(
            f"all nodes of job {job} have ranks already", "name those to have more, with --nodes"
        )
    return wanted


def _srun(job: str, nodes: Sequence[str], ranks: int) -> list[str]:
    # Of a lost node srun would only tell; its ranks are the run's to replace.
    keep = ["--kill-on-bad-exit=0", "--no-kill", "--wait=0", "--mpi=none"]
    where = [f"--nodelist={','.join(nodes)}", f"--ntasks-per-node={ranks}", f"-N{len(nodes)}"]
    return ["srun", f"--jobid={job}", "--overlap", "--quiet", *keep, *where]


def _follow(commands: list[list[str]]) -> int:
    """Run commands side by side, passing signals on.

    Returns
    -------
    The highest of their exit codes.
    """
    processes = [subprocess.Popen(command, start_new_session=True) for command in commands]

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in processes:
            process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    codes = [process.wait() for process in processes]
    return max(map(shell_code, codes))
