"""How the ranks that train work together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Name = Literal["sync", "backup", "async", "local-sgd"]


@dataclass(frozen=True)
class Mode:
    """What the user has chosen.

    name: ``sync``: every step takes the gradients of all ranks. ``backup``: of those that are
        first. ``async``: each rank steps on its own and sends what it changes to the others.
        ``local-sgd``: each steps on its own, and now and then all average what they have.
    backup: with ``backup``: how many ranks a step can do without.
    sync_every: with ``local-sgd``: steps from one averaging to the next.
    elastic: and how far a rank moves towards the average: 1 is all of the way.
    staleness: with ``async``: how many steps a rank may be ahead of the slowest.
    """

    name: Name = "sync"
    backup: int = 0
    sync_every: int = 8
    elastic: float = 1.0
    staleness: int = 64

    @property
    def own_gradients(self) -> bool:
        """Whether each rank steps on its own gradients."""
        return self.name in ("async", "local-sgd")
