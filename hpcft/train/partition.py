"""Which sample is whose: pure arithmetic over an epoch, whatever becomes of the ranks.

An epoch is a permutation of all samples that depends on nothing but seed, epoch and size. Training
eats it from the front, a global batch a step; each rank takes its slice of the batch. When the
number of ranks changes only the slices change, so that within an epoch no sample is seen twice or
left out (but for the tail of the epoch that fills no batch, if that is to be dropped).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpcft.train.shares import Weights, counts


@dataclass(frozen=True)
class Position:
    """How far training has come: ``consumed`` samples of ``epoch``'s permutation."""

    epoch: int = 0
    consumed: int = 0


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
    """``position``, or the start of the next epoch if nothing of its epoch is left to train on.

    Raises
    ------
    ValueError: not even a whole epoch makes a batch.
    """
    if batch_count(size, position.consumed, batch, ranks, drop_last):
        return position
    if not batch_count(size, 0, batch, ranks, drop_last):
        raise ValueError(f"{size} samples make no global batch of {batch} for {ranks} ranks")
    return Position(position.epoch + 1, 0)
