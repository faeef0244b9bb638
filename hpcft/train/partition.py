"""Which sample is whose: pure arithmetic over an epoch, whatever becomes of the ranks.

An epoch is a permutation of all samples that depends on nothing but seed, epoch and size. Training
eats it from the front, a global batch a step; each rank takes its slice of the batch. When the
number of ranks changes only the slices change, so that within an epoch no sample is seen twice or
left out (but for the tail of the epoch that fills no batch, if that is to be dropped).

A slice that no gradient came from, for its rank was late, is left for another pass over the epoch,
which goes through all that was left by the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hpcft.train.shares import Weights, counts

#: From, and up to which, place in an epoch's permutation.
Stretch = tuple[int, int]


@dataclass(frozen=True)
class Position:
    """How far training has come: ``consumed`` samples of a pass over ``epoch``'s permutation.

    agenda: the stretches of the permutation that the pass goes through; none: all of it.
    left: those that no step of the pass has taken.
    """

    epoch: int = 0
    consumed: int = 0
    agenda: tuple[Stretch, ...] = ()
    left: tuple[Stretch, ...] = ()

    def length(self, size: int) -> int:
        """Number of samples of the pass, in an epoch of ``size``."""
        return sum(stop - start for start, stop in self.agenda) if self.agenda else size

    def stretches(self, start: int, stop: int) -> list[Stretch]:
        """Where in the permutation the samples of the pass from ``start`` to ``stop`` are."""
        if not self.agenda:
            return [(start, stop)] if start < stop else []
        found, before = [], 0
        for first, last in self.agenda:
            begin = max(first, first + start - before)
            end = min(last, first + stop - before)
            if begin < end:
                found.append((begin, end))
            before += last - first
        return found

    def after(self, count: int, missed: Sequence[Stretch] = ()) -> Position:
        """When ``count`` more samples are consumed.

        Parameters
        ----------
        missed: the parts of those samples that nothing was learnt from.
        """
        at = self.consumed
        left = [part for start, stop in missed for part in self.stretches(at + start, at + stop)]
        return replace(self, consumed=at + count, left=(*self.left, *left))


def permutation(size: int, epoch: int, seed: int, shuffle: bool) -> npt.NDArray[np.int64]:
    """The order of samples in an epoch, shape (size,)."""
    if not shuffle:
        return np.arange(size)
    return np.random.default_rng([seed, epoch]).permutation(size)


def share(count: int, rank: int, ranks: int, weights: Weights = ()) -> tuple[int, int]:
    """The slice of ``count`` samples that is ``rank``'s: contiguous, of nearly equal sizes.

    With weights, one for each rank, in proportion to these.
    """
    if weights and count:
        shared = counts(count, weights)
        return sum(shared[:rank]), sum(shared[: rank + 1])
    small, more = divmod(count, ranks)
    start = rank * small + min(rank, more)
    return start, start + small + (rank < more)


def batch_count(size: int, consumed: int, batch: int, ranks: int, drop_last: bool) -> int:
    """Number of samples in the global batch that begins at ``consumed``; 0 if the epoch is over.

    A last batch too small to give every rank a sample is dropped even if ``drop_last`` is not set.
    """
    count = min(batch, size - consumed)
    least = batch if drop_last else ranks
    return count if count >= least else 0


def settle(position: Position, size: int, batch: int, ranks: int, drop_last: bool) -> Position:
    """``position``, or the start of the next pass if nothing of its own is left to train on.

    That is over what no step of this one has taken, if such was left by any and makes a batch, else
    over the next epoch.

    Raises
    ------
    ValueError: not even a whole epoch makes a batch.
    """

    def goes_on(at: Position) -> bool:
        return batch_count(at.length(size), at.consumed, batch, ranks, drop_last) > 0

    anew = Position(position.epoch + 1)
    if goes_on(position):
        return position
    if not goes_on(anew):
        raise ValueError(f"{size} samples make no global batch of {batch} for {ranks} ranks")
    rest = position.stretches(position.consumed, position.length(size))
    again = Position(position.epoch, 0, (*position.left, *rest))
    return again if position.left and goes_on(again) else anew
