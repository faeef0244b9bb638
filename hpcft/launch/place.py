"""Which task of which launcher this process is."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hpcft.errors import UsageError
from hpcft.launch.interface import address_towards, network_of
from hpcft.slurm.step import Step, cancel, find_step

#: Without the first nothing starts; without the others Slurm ends all tasks when one is lost.
SRUN_OPTIONS = "--mpi=pmix --kill-on-bad-exit=0 --no-kill --wait=0"


@dataclass(frozen=True)
class Place:
    """Where this shepherd is.

    rank: the MPI rank its child will have.
    size: number of ranks of the run.
    node: key of the node.
    host: name of the node for people.
    address: address of the node that the others reach.
    job: the Slurm job; empty outside of one.
    """

    rank: int
    size: int
    node: str
    host: str
    address: str
    job: str = ""


@dataclass(frozen=True)
class Task:
    """This process as one of those a launcher has started.

    starter: the launcher's name.
    launched_by_us: the launcher is mpiexec, started by hpcft's own front end.
    number_here, ranks_here: this task's number among those on its node, and how many there are.
    interface: what Open MPI's TCP is to use, None for its own choice.
    prefix: where Open MPI is installed, None if it knows itself.
    step: the Slurm step, if srun is the launcher.
    joined: it was started to join a run that is under way.
    of_another_job: that is another Slurm job's.
    """

    place: Place
    starter: str
    launched_by_us: bool
    number_here: int
    ranks_here: int
    interface: str | None
    prefix: Path | None
    step: Step | None = None
    joined: bool = False
    of_another_job: bool = False

    @property
    def launch(self) -> str:
        """What all tasks of this launch call it, and no other's."""
        return self.step.launch if self.step else f"mpiexec-{os.getppid()}"

    def end_all(self) -> None:
        """Have the launcher end all its tasks.

        A task that just ends leaves the others waiting for it in MPI_Init.
        """
        if self.step:
            cancel(self.step)
        else:
            os.kill(os.getppid(), signal.SIGTERM)


def find_task(environ: Mapping[str, str] = os.environ) -> Task | None:
    """The task this process is, or None when no launcher has started it.

    Raises
    ------
    UsageError: the launcher cannot be used as it is.
    """
    if step := find_step(environ):
        _require_pmix(step)
        return _slurm_task(step, environ)
    if "PMIX_RANK" in environ:
        host = socket.gethostname()
        place = Place(
            int(environ["PMIX_RANK"]),
            int(environ["OMPI_COMM_WORLD_SIZE"]),
            host,
            host,
            "127.0.0.1",
        )
        here = int(environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
        if here != place.size:
            raise UsageError(
                "mpiexec has started ranks on several nodes, and ends them all when it loses one",
                "use srun, or one node",
            )
        ours = "HPCFT_LAUNCHER" in environ
        number = int(environ["OMPI_COMM_WORLD_LOCAL_RANK"])
        return Task(place, "mpiexec", ours, number, here, None, prefix_of_wheel(environ))
    if "SLURM_JOB_ID" in environ:
        _require_whole_allocation(environ)
    return None


def guest_task(environ: Mapping[str, str] = os.environ) -> Task:
    """This process as one that is to join a run; it has no place in MPI yet.

    Raises
    ------
    UsageError: the others cannot be reached from here.
    """
    if step := find_step(environ):
        return replace(_slurm_task(step, environ), joined=True)
    host = socket.gethostname()
    place = Place(0, 1, host, host, "127.0.0.1")
    return Task(place, "hpcft join", False, 0, 1, None, prefix_of_wheel(environ), None, True)


def _require_whole_allocation(environ: Mapping[str, str]) -> None:
    """Without srun there is one place to train at: the only node of the allocation."""
    remedy = f"put srun in front: srun {SRUN_OPTIONS} python -m hpcft.run ..."
    if environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        raise UsageError(
            "this is a Slurm allocation of several nodes, and nothing has started a task on each",
            remedy,
        )
    # salloc leaves its shell where it was called, often a login node.
    here = environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    node = environ.get("SLURM_JOB_NODELIST", here)
    if here != node:
        raise UsageError(f"this is {here}, and the node allocated is {node}", remedy)


def _require_pmix(step: Step) -> None:
    if not step.pmix:
        raise UsageError(
            "srun has started the tasks without PMIx, so that they cannot find each other",
            f"use srun {SRUN_OPTIONS} (is pmix missing in `srun --mpi=list`, the site's Slurm was "
            "built without it)",
        )


def _slurm_task(step: Step, environ: Mapping[str, str]) -> Task:
    try:
        address = address_towards(step.launcher)
    except OSError as error:
        raise UsageError(
            f"there is no way from {step.host} to srun at {step.launcher}: {error}",
            "check the node's network",
        ) from error
    place = Place(step.task, step.tasks, step.host, step.host, address, step.job)
    return Task(
        place,
        "srun",
        False,
        step.task_here,
        step.tasks_here,
        network_of(address),
        prefix_of_wheel(environ),
        step,
    )


def prefix_of_wheel(environ: Mapping[str, str]) -> Path | None:
    """Where the Open MPI of the Python environment lies, which was configured for another place."""
    if "OPAL_PREFIX" in environ:
        return Path(environ["OPAL_PREFIX"])
    prefix = Path(sys.prefix)
    return prefix if any(prefix.glob("lib/libmpi.so*")) else None
