"""Threads that play ranks, for what needs several but no MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcft.ckpt.ranks import Memory


@dataclass
class Board:
    """What threads that play ranks share."""

    size: int
    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)


class Player:
    """A thread that plays a rank."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self.rank = rank
        self.size = board.size

    def _all(self, value: Any) -> list[Any]:
        self._board.values[self.rank] = value
        self._board.barrier.wait()
        values = list(self._board.values)
        self._board.barrier.wait()
        return values

    def share(self, value: Any) -> Any:
        return self._all(value)[0]

    def least(self, number: int) -> int:
        return min(self._all(number))

    def gather(self, value: Any) -> list[Any]:
        values = self._all(value)
        return [] if self.rank else values

    def exchange(
        self, outgoing: Sequence[Sequence[Memory]], incoming: Sequence[Sequence[Memory]]
    ) -> None:
        sent = self._all([[memory.copy() for memory in memories] for memories in outgoing])
        for theirs, rooms in zip(sent, incoming, strict=True):
            for memory, room in zip(theirs[self.rank], rooms, strict=True):
                room[:] = memory


def together(size: int, do: Callable[[Player], Any]) -> list[Any]:
    """What ``do`` returns, or raises, in each rank."""
    board = Board(size)
    results: list[Any] = [None] * size

    def play(rank: int) -> None:
        try:
            results[rank] = do(Player(board, rank))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=play, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
