"""``mpiexec --with-ft ulfm -n 3 python -m hpcft.world.trial``: does this MPI survive a killed rank?

The last rank kills itself with SIGKILL; the others must learn of it, agree, and go on without it.
Rank 0 then prints one line, ``survived 2 of 3 in 0.0041 s``. Nothing of hpcft's own takes part, so
that what fails here is the MPI library's or the machine's.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from mpi4py import MPI


def main() -> None:
    """Run one rank of the trial; does not return."""
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    world.Barrier()
    if rank == size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while True:
            world.Barrier()
    except MPI.Exception as error:
        expected = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
        if error.Get_error_class() not in expected:
            raise
    world.Revoke()
    survivors = world.Shrink()
    agreed = survivors.Agree(1)
    total = survivors.allreduce(1)
    if rank == 0:
        print(f"survived {total} of {size} in {time.monotonic() - start:.4f} s", flush=True)
    sys.stdout.flush()
    # MPI_Finalize would wait for the dead.
    os._exit(0 if agreed == 1 and total == size - 1 else 1)


if __name__ == "__main__":
    main()
