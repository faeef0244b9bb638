"""The environment a rank is started with: what Open MPI needs to be told."""

from __future__ import annotations

import os
from pathlib import Path

#: Deterministic whatever the placement of ranks: these choose algorithms by who shares a node
#: with whom, so that a spare on another node would change the order of additions.
_PLACEMENT_DEPENDENT = "^han,xhc,acoll,sm"


def rank_settings(prefix: Path | None, ranks_here: int, interface: str | None) -> dict[str, str]:
    """Settings for a rank, as environment variables.

    Parameters
    ----------
    prefix: where Open MPI is installed, None if it knows itself.
    ranks_here: ranks on this node.
    interface: interface or CIDR that TCP is to use; None leaves the choice to Open MPI.
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
        "PYTHONUNBUFFERED": "1",
        # The server may offer munge, which the Open MPI of a Python environment lacks.
        "PMIX_MCA_psec": "native",
    }
    if prefix:
        settings |= {"OPAL_PREFIX": str(prefix), "PMIX_PREFIX": str(prefix)}
    if ranks_here > len(os.sched_getaffinity(0)):
        # Waiting ranks spin; where they share processors they must give way.
        settings["OMPI_MCA_mpi_yield_when_idle"] = "true"
    if interface:
        settings["OMPI_MCA_btl_tcp_if_include"] = interface
    # The user's own settings win.
    return {name: value for name, value in settings.items() if name not in os.environ}
