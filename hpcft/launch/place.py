"""Which task of which launcher this process is."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where this shepherd is.

    rank: the MPI rank its child will have.
    size: number of ranks of the run.
    node: key of the node.
    host: name of the node for people.
    address: address of the node that the others reach.
    """

    rank: int
    size: int
    node: str
    host: str
    address: str


@dataclass(frozen=True)
class Task:
    """This process as one of those a launcher has started.

    starter: the launcher's name.
    launched_by_us: the launcher is mpiexec, started by hpcft's own front end.
    ranks_here: tasks on this node.
    interface: what Open MPI's TCP is to use, None for its own choice.
    prefix: where Open MPI is installed, None if it knows itself.
    """

    place: Place
    starter: str
    launched_by_us: bool
    ranks_here: int
    interface: str | None
    prefix: Path | None


def find_task(environ: Mapping[str, str] = os.environ) -> Task | None:
    """The task this process is, or None when no launcher has started it.

    Raises
    ------
    UsageError: the launcher cannot be used as it is.
    """
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        raise NotImplementedError
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
        return Task(place, "mpiexec", True, here, None, _wheel_prefix(environ))
    return None


def _wheel_prefix(environ: Mapping[str, str]) -> Path | None:
    """Where the Open MPI of the Python environment lies, which was configured for another place."""
    if "OPAL_PREFIX" in environ:
        return Path(environ["OPAL_PREFIX"])
    prefix = Path(sys.prefix)
    return prefix if any(prefix.glob("lib/libmpi.so*")) else None
