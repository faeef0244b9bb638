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
    """

    name: Name = "sync"
    backup: int = 0

    @property
    def lockstep(self) -> bool:
        """Whether all ranks do the same steps together."""
        return self.name in ("sync", "local-sgd")
