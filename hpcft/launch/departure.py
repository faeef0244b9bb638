"""Settling the step at whose end all ranks leave, by the rules in hpcft.world.departure."""

from __future__ import annotations

from collections.abc import Set


class Departure:
    """What one shepherd knows of it.

    All shepherds come to the same step, for those of a membership's epoch know its ranks alike.

    Attributes
    ----------
    epoch: of the membership this shepherd's rank is in.
    """

    def __init__(self) -> None:
        self.epoch = 0
        #: epoch -> rank -> the step it was at when it was asked
        self._at: dict[int, dict[int, int]] = {}

    def at(self, epoch: int, rank: int, step: int) -> None:
        """``rank`` has said how far it is."""
        self._at.setdefault(epoch, {}).setdefault(rank, step)

    def until(self, active: Set[int]) -> int | None:
        """The step to leave at; None as long as not all active ranks have said how far they are."""
        known = self._at.get(self.epoch, {})
        if not active <= known.keys():
            return None
        return max(known[rank] for rank in active) + 1
