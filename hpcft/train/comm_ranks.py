"""The ranks of a communicator, as checkpoints take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcft.ckpt.ranks import Memory
from hpcft.train.state import dump, load
from hpcft.train.transfer import COUNTABLE
from hpcft.world.requests import wait_all

#: Of messages beside those of the script, which uses the same communicator.
_TAG = 32_012


class CommRanks:
    """The ranks of a communicator, as a :class:`hpcft.ckpt.save.Saver` takes them.

    Nothing received is used before it is certain that the communicator was whole: Open MPI 5.0 has
    been seen to cut a collective short without an error.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self.rank: int = comm.rank
        self.size: int = comm.size

    def _certain(self) -> None:
        if self._comm.Is_revoked():
            raise MPI.Exception(MPI.ERR_REVOKED)

    def share(self, value: Any) -> Any:
        """Rank 0's value, in all."""
        package = dump(value) if self.rank == 0 else b""
        length = np.array([len(package)], np.int64)
        self._comm.Bcast(length, 0)
        self._certain()
        buffer = np.frombuffer(package, np.uint8) if package else np.empty(length[0], np.uint8)
        self._comm.Bcast([buffer, MPI.BYTE], 0)
        self._certain()
        return value if self.rank == 0 else load(buffer.tobytes())

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        found = np.array([number], np.int64)
        self._comm.Allreduce(MPI.IN_PLACE, found, MPI.MIN)
        self._certain()
        return int(found[0])

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, by rank, in rank 0."""
        package = np.frombuffer(dump(value), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        self._comm.Allgather(np.array([package.size], np.int64), lengths)
        self._certain()
        everything = np.empty(int(lengths.sum()) if self.rank == 0 else 0, np.uint8)
        into = [everything, lengths.tolist(), MPI.BYTE] if self.rank == 0 else None
        self._comm.Gatherv([package, MPI.BYTE], into, 0)
        self._certain()
        if self.rank:
            return []
        ends = np.cumsum(lengths)
        return [
            load(everything[end - n : end].tobytes())
            for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]

    def exchange(
        self, outgoing: Sequence[Sequence[Memory]], incoming: Sequence[Sequence[Memory]]
    ) -> None:
        """Move bytes between ranks."""
        requests = [
            self._comm.Irecv([piece, MPI.BYTE], peer, _TAG) for peer, piece in _messages(incoming)
        ]
        requests += [
            self._comm.Isend([piece, MPI.BYTE], peer, _TAG) for peer, piece in _messages(outgoing)
        ]
        wait_all(requests)
        self._certain()


def _messages(memories: Sequence[Sequence[Memory]]) -> Iterator[tuple[int, Memory]]:
    """The memory for each rank, in pieces MPI can count."""
    for peer, pieces in enumerate(memories):
        for memory in pieces:
            for begin in range(0, memory.size, COUNTABLE):
                yield peer, memory[begin : begin + COUNTABLE]
