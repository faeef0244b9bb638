"""Collectives among some ranks of a communicator, of messages between two.

Who these are changes from step to step, and MPI takes a collective over all ranks, or one that does
not end when one of them dies, to make a communicator of some.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI

from hpcft.train.transfer import buffers
from hpcft.world.requests import wait_all

#: Of messages beside those of the script, which uses the same communicator.
_TAG = 32_013


def add_up(comm: MPI.Intracomm, ranks: Sequence[int], flat: torch.Tensor) -> None:
    """Add up ``flat``, of shape (n,) and in host memory, over ``ranks``, in place.

    In a ring, so that each rank sends and receives twice its size, however many they are (Patarasuk
    and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). All get
    the same to the bit: every part is added up once, by one of them, and then passed on.

    Raises
    ------
    MPI.Exception: a rank has failed.
    """
    count, place = len(ranks), ranks.index(comm.rank)
    right, left = ranks[(place + 1) % count], ranks[place - 1]
    parts = torch.tensor_split(flat, count)
    room = torch.empty_like(parts[0])
    for turn in range(count - 1):
        mine, theirs = parts[(place - turn) % count], parts[(place - turn - 1) % count]
        arrived = room[: len(theirs)]
        _swap(comm, mine, right, arrived, left)
        theirs.add_(arrived)
    for turn in range(count - 1):
        _swap(comm, parts[(place - turn + 1) % count], right, parts[(place - turn) % count], left)


def give(comm: MPI.Intracomm, ranks: Sequence[int], flat: torch.Tensor) -> None:
    """Give ``ranks`` the ``flat``, of shape (n,) and in host memory, of the first of them.

    Raises
    ------
    MPI.Exception: a rank has failed.
    """
    if comm.rank == ranks[0]:
        wait_all([comm.Isend(data, r, _TAG) for r in ranks[1:] for data in buffers([flat])])
    else:
        wait_all([comm.Irecv(data, ranks[0], _TAG) for data in buffers([flat])])


def _swap(
    comm: MPI.Intracomm, sent: torch.Tensor, to: int, received: torch.Tensor, source: int
) -> None:
    requests = [comm.Irecv(data, source, _TAG) for data in buffers([received])]
    requests += [comm.Isend(data, to, _TAG) for data in buffers([sent])]
    wait_all(requests)
