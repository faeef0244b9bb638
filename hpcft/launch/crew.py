"""Who trains, as a shepherd knows it from its rank."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Crew:
    """The ranks that train, renewed whenever the world has healed.

    active: their numbers in MPI.
    first: that of who plays rank 0.
    epoch: of their membership.
    """

    active: set[int]
    epoch: int = 0
    first: int = 0
