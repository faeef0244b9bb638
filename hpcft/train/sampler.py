"""Batches for a world that changes its size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from hpcft.errors import HpcftError
from hpcft.train.partition import Position, Stretch, batch_count, permutation, settle, share
from hpcft.train.shares import Place, Plan, Weights


class ElasticBatchSampler(Sampler[list[int]]):
    """Gives a DataLoader this rank's part of every global batch.

    ::

        sampler = hpcft.ElasticBatchSampler(len(data), batch_size=32)
        loader = DataLoader(data, batch_sampler=sampler)
        state = hpcft.State(..., sampler=sampler)

    Tracked in the state it goes on at the last committed step after a failure, however far the
    loader had read ahead. An iteration runs to the end of the epoch; where samples of ranks that
    were late are left (``--mode backup``), others follow that go through them, before ``epoch``
    counts one more.

    Parameters
    ----------
    size: number of samples.
    batch_size: samples a rank and step.
    shuffle: a new order each epoch; else the order of the data.
    seed: what the orders follow from.
    drop_last: leave out the samples at an epoch's end that fill no global batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        if size < 1 or batch_size < 1:
            raise HpcftError(
                f"{size} samples in batches of {batch_size} make no training",
                "give at least one of each",
            )
        self.size = size
        self.batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._rank, self._ranks, self._batch = 0, 1, batch_size
        self._position = Position()
        self._plan = Plan()
        #: As it is to be from the next commit on.
        self._planned = self._plan
        self._read: Place = (0, 0)

    def place(self, rank: int, ranks: int, global_batch: int | None = None) -> None:
        """Say whose batches these are.

        Parameters
        ----------
        global_batch: samples a step over all ranks; None for ``batch_size`` each.

        Raises
        ------
        HpcftError: there are too few samples for a single batch.
        """
        self._rank, self._ranks = rank, ranks
        self._batch = global_batch or self.batch_size * ranks
        if not self._plan.fits(ranks):
            # Whose the weights were is not known.
            self._plan = Plan()
        self._planned = self._plan
        self._settle(self._position)
        self._read = (self._position.epoch, self._position.consumed)

    def share_out(self, weights: Weights, since: Place) -> None:
        """Share out in proportion to these weights, one for each rank, from a batch on.

        Part of the state when the next step is committed; until then :meth:`place` undoes it.

        Parameters
        ----------
        since: where that batch begins; not before :attr:`read`, in any rank.
        """
        here = (self._position.epoch, self._position.consumed)
        self._planned = self._plan.changed(weights, since, here)

    @property
    def read(self) -> Place:
        """Up to where batches have been taken from this sampler."""
        return max(self._read, (self._position.epoch, self._position.consumed))

    def _share(self, count: int, rank: int, epoch: int, consumed: int) -> Stretch:
        return share(count, rank, self._ranks, self._planned.at((epoch, consumed)))

    def _settle(self, position: Position) -> None:
        try:
            self._position = settle(position, self.size, self._batch, self._ranks, self._drop_last)
        except ValueError as error:
            raise HpcftError(str(error), "give a smaller batch_size") from None

    def _count_in(self, position: Position, consumed: int) -> int:
        length = position.length(self.size)
        return batch_count(length, consumed, self._batch, self._ranks, self._drop_last)

    @property
    def epoch(self) -> int:
        """Number of epochs completed."""
        return self._position.epoch

    @property
    def global_count(self) -> int:
        """Samples of all ranks in the step that comes next."""
        return self._count_in(self._position, self._position.consumed)

    @property
    def local_count(self) -> int:
        """Samples of this rank in the step that comes next."""
        return self.count_of([self._rank])

    def count_of(self, ranks: Iterable[int]) -> int:
        """Samples of some ranks in the step that comes next."""
        return sum(stop - start for start, stop in map(self._slice, ranks))

    def _slice(self, rank: int) -> Stretch:
        at = self._position
        return self._share(self.global_count, rank, at.epoch, at.consumed)

    def advance(self, taken: Collection[int] | None = None) -> None:
        """A step is committed.

        Parameters
        ----------
        taken: the ranks whose samples it has learnt from; None for all.
        """
        missed = [r for r in range(self._ranks) if taken is not None and r not in taken]
        left = [self._slice(rank) for rank in missed]
        self._plan = self._planned
        self._settle(self._position.after(self.global_count, left))

    def __iter__(self) -> Iterator[list[int]]:
        at = self._position
        consumed = at.consumed
        order = permutation(self.size, at.epoch, self._seed, self._shuffle)
        if at.agenda:
            order = np.concatenate([order[start:stop] for start, stop in at.agenda])
        while count := self._count_in(at, consumed):
            start, stop = self._share(count, self._rank, at.epoch, consumed)
            batch = order[consumed + start : consumed + stop].tolist()
            consumed += count
            self._read = (at.epoch, consumed)
            yield batch

    def __len__(self) -> int:
        """Steps left in the pass."""
        left = self._position.length(self.size) - self._position.consumed
        whole, rest = divmod(left, self._batch)
        return whole + bool(rest >= self._ranks and not self._drop_last)

    def state_dict(self) -> dict[str, Any]:
        """The position, for the state."""
        at = self._position
        state: dict[str, Any] = {"epoch": at.epoch, "consumed": at.consumed}
        for name in ("agenda", "left"):
            if stretches := getattr(at, name):
                state[name] = np.array(stretches, np.int64)
        if self._plan.stages:
            state["shares"] = self._plan.as_numbers()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position :meth:`state_dict` gave."""
        agenda, left = (
            tuple((int(start), int(stop)) for start, stop in state.get(name, ()))
            for name in ("agenda", "left")
        )
        self._position = Position(state["epoch"], state["consumed"], agenda, left)
        self._plan = self._planned = Plan.of(state.get("shares", []))
