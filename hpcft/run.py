"""``python -m hpcft.run``: start a training whose ranks may die.

The same command serves as launcher on one machine, and as what srun or mpiexec start for every
rank; which of them this process is follows from its environment.
"""

from __future__ import annotations

import asyncio
import os
import sys

from hpcft.errors import HpcftError
from hpcft.launch import local
from hpcft.launch.options import RunOptions, check_sizes, parse
from hpcft.launch.place import SRUN_OPTIONS, Task, find_task
from hpcft.launch.settings import rank_settings
from hpcft.launch.shepherd import Shepherd
from hpcft.slurm import srun
from hpcft.slurm.step import find_step


def main(argv: list[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's).

    Returns
    -------
    The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        options = parse(argv)
        task = find_task()
        if task is None:
            return local.launch(options, argv)
        return _shepherd(options, task)
    except HpcftError as error:
        # Every task comes to the same error; one says so.
        if os.environ.get("SLURM_PROCID", os.environ.get("PMIX_RANK", "0")) == "0":
            print(f"hpcft: {error.line}", file=sys.stderr)
        return error.exit_code


def _shepherd(options: RunOptions, task: Task) -> int:
    active = check_sizes(options, task.place.size, task.starter)
    if not task.launched_by_us and task.place.rank == 0:
        local.create_run_directory(options, task.place.size)
    if task.starter == "srun" and task.place.rank == 0:
        _warn_of_srun_options()
    settings = rank_settings(task.prefix, task.ranks_here, task.interface)
    shepherd = Shepherd(options, task.place, settings, active, task.ranks_here, task.end_all)
    return asyncio.run(shepherd.run())


def _warn_of_srun_options() -> None:
    # The job runs without them as well, only not as long: therefore no error.
    step = find_step(os.environ)
    options = srun.options_of(step) if step else None
    for problem in srun.problems(options) if options else []:
        print(f"hpcft: warning: srun's {problem}; use srun {SRUN_OPTIONS}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
