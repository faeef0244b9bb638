"""``python -m hpcft.run``: start a training whose ranks may die.

The same command serves as launcher on one machine, and as what srun or mpiexec start for every
rank; which of them this process is follows from its environment.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from functools import partial

from hpcft.ckpt.near import claimed
from hpcft.errors import HpcftError, UsageError
from hpcft.launch import local
from hpcft.launch.keeper import Keeper
from hpcft.launch.options import RunOptions, Sizes, check_sizes, parse
from hpcft.launch.place import SRUN_OPTIONS, Task, find_task
from hpcft.launch.register import register
from hpcft.launch.scratch import scratch
from hpcft.launch.settings import rank_settings
from hpcft.slurm import srun
from hpcft.slurm.job import find_job
from hpcft.slurm.step import find_step
from hpcft.telemetry.rundir import RunDirectory


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's).

    Returns
    -------
    The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "SUBMITIT_EXECUTOR" in os.environ:
        # Slurm sends all steps of the job what is meant for submitit's, which then ends this one.
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
    return reported(partial(_run, argv))


def reported(life: Callable[[], int]) -> int:
    """Call ``life``, and say what is wrong if it raises HpcftError.

    Returns
    -------
    The exit code that ``life`` gives, or that of the error.
    """
    try:
        return life()
    except HpcftError as error:
        # Every task comes to the same error; one says so.
        if os.environ.get("SLURM_PROCID", os.environ.get("PMIX_RANK", "0")) == "0":
            print(f"hpcft: {error.line}", file=sys.stderr)
        return error.exit_code


def _run(argv: list[str]) -> int:
    options = parse(argv)
    task = find_task()
    if task is None:
        return local.launch(options, argv)
    return _shepherd(options, task, argv)


def _shepherd(options: RunOptions, task: Task, argv: list[str]) -> int:
    sizes = check_sizes(options, task.place.size, task.starter)
    rundir = RunDirectory(options.run_dir)
    if task.step and rundir.called_off(task.launch):
        # The request to end came before this task, which is on a slow node, was there.
        return 1
    if not task.launched_by_us and task.place.rank == 0:
        try:
            local.require_places(options)
        except UsageError as error:
            if task.step:
                # The others would wait for this task, which is not to come.
                print(f"hpcft: {error.line}", file=sys.stderr, flush=True)
                task.end_all()
            raise
        local.create_run_directory(options, task.place.size, task.launch)
        register(options, argv)
    if task.starter == "srun" and task.place.rank == 0 and options.verbose:
        _warn_of_srun_options()
        if options.most_requeues is not None:
            _warn_of_no_requeue()
    return keep(options, task, sizes, Keeper.run)


def keep(
    options: RunOptions,
    task: Task,
    sizes: Sizes,
    life: Callable[[Keeper], Coroutine[None, None, int]],
) -> int:
    """Have a keeper look after this task's rank.

    Parameters
    ----------
    life: what the keeper does until the run is over; gives the exit code.
    """
    tiers = options.checkpoints.near if options.checkpoints else ()
    with scratch() as folder, claimed(tiers, time.time()):
        settings = rank_settings(task.prefix, task.ranks_here, task.interface, folder)
        code = asyncio.run(_alone(life(Keeper(options, task, settings, sizes, folder))))
        # All is done; Slurm, which ends a job that is requeued, is not to keep us from clearing up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return code


async def _alone(life: Coroutine[None, None, int]) -> int:
    try:
        return await life
    finally:
        # asyncio closes its pipe before it lets go of signals, and would complain of those between.
        signal.set_wakeup_fd(-1)


def _warn_of_srun_options() -> None:
    # The job runs without them as well, only not as long: therefore no error.
    step = find_step(os.environ)
    options = srun.options_of(step) if step else None
    for problem in srun.problems(options) if options else []:
        print(f"hpcft: warning: srun's {problem}; use srun {SRUN_OPTIONS}", file=sys.stderr)


def _warn_of_no_requeue() -> None:
    step = find_step(os.environ)
    job = find_job(step.job) if step else None
    if job and job.problem:
        print(f"hpcft: warning: --requeue will do nothing: {job.problem}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
