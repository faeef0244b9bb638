"""Rank after rank comes to the fence; who leaves it says how many had come."""

import sys
import time
from pathlib import Path

from mpi4py import MPI

from hpcft.world import pmix

folder = Path(sys.argv[1])
rank = MPI.COMM_WORLD.rank
for fence in range(5):
    time.sleep(0.05 * ((rank + fence) % MPI.COMM_WORLD.size))
    (folder / f"{fence}-{rank}").touch()
    pmix.fence()
    print("come", len(list(folder.glob(f"{fence}-*"))), flush=True)
