"""Ending a run from outside."""

from __future__ import annotations

import os
import signal

from hpcft.errors import HpcftError
from hpcft.slurm import queue as slurm
from hpcft.watch.runs import Run


def ask(run: Run, kill: bool = False) -> None:
    """Ask a run to end: the first time in order, the second time at once.

    Parameters
    ----------
    kill: do not ask.

    Raises
    ------
    HpcftError: it cannot be asked from here.
    """
    entry = run.entry
    if entry is None:
        raise HpcftError(
            f"nobody has noted where {run.name} was started",
            "end its launcher with SIGTERM there; `hpcft ps --all` has the runs that can be ended",
        )
    if entry.step:
        if why := slurm.signal_step(entry.job, entry.step, "KILL" if kill else "TERM"):
            raise HpcftError(f"Slurm does not end step {entry.name}: {why}")
    elif entry.here:
        if entry.alive:
            try:
                os.kill(entry.pid, signal.SIGKILL if kill else signal.SIGTERM)
            except ProcessLookupError:
                pass
            except PermissionError as error:
                raise HpcftError(f"process {entry.pid} is another user's") from error
    else:
        raise HpcftError(
            f"{run.name} was started on {entry.host}",
            f"end it there: {_there(entry.job, entry.host)}hpcft stop {entry.run_dir}",
        )


def _there(job: str, host: str) -> str:
    return f"srun --jobid={job} --overlap -N1 -n1 -w {host} " if job else ""
