"""The environment a rank is started with: what Open MPI needs to be told, and scripts expect."""

from __future__ import annotations

import os
from pathlib import Path

#: Deterministic whatever the placement of ranks: these choose algorithms by who shares a node
#: with whom, so that a spare on another node would change the order of additions.
_PLACEMENT_DEPENDENT = "^han,xhc,acoll,sm"
#: Where Linux lists the devices that Open MPI reaches through libfabric: InfiniBand, Omni-Path and
#: EFA in the first, Slingshot in the second.
_FABRICS = ("infiniband", "cxi")


def rank_settings(
    prefix: Path | None, ranks_here: int, interface: str | None, scratch: Path
) -> dict[str, str]:
    """Settings for a rank, as environment variables.

    Parameters
    ----------
    prefix: where Open MPI is installed, None if it knows itself.
    ranks_here: ranks on this node.
    interface: interface or CIDR that TCP is to use; None leaves the choice to Open MPI.
    scratch: a directory for the memory the rank shares with others on this node.
    """
    settings = {
        "OMPI_MCA_mpi_ft_enable": "true",
        # The shepherds are the one failure detector; see hpcft.world.notify.
        "OMPI_MCA_mpi_ft_detector": "false",
        # ULFM works through ob1 alone: UCX reports no failures.
        "OMPI_MCA_pml": "ob1",
        "OMPI_MCA_coll": _PLACEMENT_DEPENDENT,
        # Open MPI up to 5.0.9 takes a process it has not yet spoken to for alive, whatever it is
        # told, and its agreements wait for it (open-mpi/ompi pull request 13501). So it is to know
        # all processes from the beginning, however many there are.
        "OMPI_MCA_mpi_add_procs_cutoff": "1000000",
        # In a binary tree and in a string agreements were seen to hang when processes died shortly
        # after each other; in a star nobody depends on anyone but the first. (What Open MPI says
        # of this setting has string and star the wrong way round.)
        "OMPI_MCA_coll_ftagree_era_topology": "3",
        "OMPI_MCA_btl_sm_backing_directory": str(scratch),
        "PYTHONUNBUFFERED": "1",
        # The server may offer munge, which the Open MPI of a Python environment lacks.
        "PMIX_MCA_psec": "native",
    }
    if prefix:
        settings |= {"OPAL_PREFIX": str(prefix), "PMIX_PREFIX": str(prefix)}
    if ranks_here > len(os.sched_getaffinity(0)):
        # Waiting ranks spin; where they share processors they must give way.
        settings["OMPI_MCA_mpi_yield_when_idle"] = "true"
    if not has_fabric():
        # Open MPI (5.0 at least) sleeps for a second when it finds libfabric of no use.
        settings["OMPI_MCA_btl"] = "^ofi"
    if interface:
        settings["OMPI_MCA_btl_tcp_if_include"] = interface
    return _unless_given(settings)


def local_settings(number_here: int, ranks_here: int) -> dict[str, str]:
    """Where a process is on its node, as scripts expect it that choose a GPU by it.

    That is of the process, spares counted, and stays as it is when a spare is adopted; what part a
    process plays (``RANK``, ``WORLD_SIZE``) changes, and only the job can tell.

    Parameters
    ----------
    number_here, ranks_here: the process's number on this node, and how many there are.
    """
    return _unless_given({"LOCAL_RANK": str(number_here), "LOCAL_WORLD_SIZE": str(ranks_here)})


def _unless_given(settings: dict[str, str]) -> dict[str, str]:
    # The user's own settings win.
    return {name: value for name, value in settings.items() if name not in os.environ}


def has_fabric(classes: Path = Path("/sys/class")) -> bool:
    """Whether this node has more than Ethernet, by what the kernel lists in ``classes``."""
    return any(any((classes / name).glob("*")) for name in _FABRICS)
