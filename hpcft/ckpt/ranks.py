"""The ranks that save or restore together, as this package sees them: without MPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

#: Bytes, flat.
Memory = np.ndarray[Any, Any]


class Ranks(Protocol):
    """The ranks that work together. All calls are collective."""

    rank: int
    size: int

    def share(self, value: Any) -> Any:
        """Rank 0's value, in all."""

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, by rank, in rank 0; nothing in the others."""

    def exchange(
        self, outgoing: Sequence[Sequence[Memory]], incoming: Sequence[Sequence[Memory]]
    ) -> None:
        """Move bytes between ranks.

        Parameters
        ----------
        outgoing: for each rank what it is sent, in order.
        incoming: for each rank where what it sends goes; as many as it sends, of the same lengths.
        """


class Alone:
    """A process that works by itself."""

    rank = 0
    size = 1

    def share(self, value: Any) -> Any:
        return value

    def least(self, number: int) -> int:
        return number

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(
        self, outgoing: Sequence[Sequence[Memory]], incoming: Sequence[Sequence[Memory]]
    ) -> None:
        return None
