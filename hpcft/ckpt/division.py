"""What the ranks hold of a sharded leaf and what they write of it, for all leaves of one kind.

A model has thousands of leaves, but of few shapes, and cut in few ways; and there may be hundreds
of ranks, each of which has to know what concerns it. So all that follows from a shape and its
shards is worked out once, and only for what touches a rank's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import NamedTuple

import numpy as np

from hpcft.ckpt.layout import LARGE, PAGE
from hpcft.ckpt.shards import Holding, Numbers, Runs


class Cut(NamedTuple):
    """Bytes ``begin`` to ``end`` of a leaf, which ``owner`` moves to or from the file."""

    owner: int
    begin: int
    end: int


class Common(NamedTuple):
    """What a cut and a shard have in common.

    holders: the ranks that hold the shard.
    begin, end: in the shard's memory.
    runs: in the leaf.
    """

    cut: Cut
    holders: tuple[int, ...]
    begin: int
    end: int
    runs: Runs


@dataclass(frozen=True, eq=False)
class Division:
    """Leaves of one shape and type of which the ranks hold the same shards.

    item: bytes of an element.
    holdings: who holds what.
    """

    shape: tuple[int, ...]
    item: int
    holdings: tuple[Holding, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item

    @cached_property
    def _runs(self) -> tuple[Runs, ...]:
        return tuple(Runs.of(self.shape, self.item, one.shard) for one in self.holdings)

    @cached_property
    def _limits(self) -> tuple[Numbers, Numbers]:
        """Between what bytes each shard lies."""
        begins = np.array([runs.begins[0] for runs in self._runs], np.int64)
        return begins, np.array([runs.ends[-1] for runs in self._runs], np.int64)

    @property
    def complete(self) -> bool:
        """Whether the shards make up the tensor: no hole, no overlap."""
        nothing = np.empty(0, np.int64)
        begins = np.concatenate([nothing, *(runs.begins for runs in self._runs)])
        ends = np.concatenate([nothing, *(runs.ends for runs in self._runs)])
        order = np.argsort(begins)
        limits = np.concatenate([[0], ends[order]])
        return bool((begins[order] == limits[:-1]).all() and limits[-1] == self.nbytes)

    def cuts(self, apart: bool) -> list[Cut]:
        """Who writes what, in order; all of the leaf.

        Parameters
        ----------
        apart: each rank writes a file of its own.
        """
        nbytes = self.nbytes
        if nbytes < LARGE:
            return [Cut(0, 0, nbytes)] if nbytes else []
        stretches = [
            (int(runs.begins[0]), int(runs.ends[-1]), one.ranks)
            for runs, one in zip(self._runs, self.holdings, strict=True)
        ]
        if any(len(runs.begins) > 1 for runs in self._runs):
            everybody = sorted(rank for one in self.holdings for rank in one.ranks)
            stretches = [(0, nbytes, tuple(everybody))]
        found = []
        for begin, end, ranks in sorted(stretches):
            limits = [begin + (end - begin) * i // len(ranks) for i in range(len(ranks) + 1)]
            places = [boundary(limit, nbytes, apart) for limit in limits]
            for rank, (first, last) in zip(ranks, pairwise(places), strict=True):
                if first < last:
                    found.append(Cut(rank, first, last))
        if (tail := nbytes % PAGE) and not apart:
            found.append(Cut(0, nbytes - tail, nbytes))
        return found

    def common(self, rank: int, cuts: Sequence[Cut]) -> list[Common]:
        """What cuts and shards have in common, so far as it concerns ``rank``.

        Returns
        -------
        In the order of the cuts, and for each of the holdings.
        """
        first, last = self._limits
        begins = np.array([cut.begin for cut in cuts], np.int64)
        ends = np.array([cut.end for cut in cuts], np.int64)
        near: set[tuple[int, int]] = set()
        for i, cut in enumerate(cuts):
            if cut.owner == rank:
                there = np.flatnonzero((first < cut.end) & (last > cut.begin))
                near.update((i, j) for j in there.tolist())
        for j, holding in enumerate(self.holdings):
            if rank in holding.ranks:
                there = np.flatnonzero((begins < last[j]) & (ends > first[j]))
                near.update((i, j) for i in there.tolist())
        found = []
        for i, j in sorted(near):
            cut, runs = cuts[i], self._runs[j]
            begin, end = runs.between(cut.begin, cut.end)
            if begin < end:
                inside = runs.within(cut.begin, cut.end)
                found.append(Common(cut, self.holdings[j].ranks, begin, end, inside))
        return found


def boundary(place: int, nbytes: int, apart: bool = False) -> int:
    """The page boundary at or before ``place`` in a leaf; if it is apart, its end is one, too.

    A page is a multiple of every element's size.
    """
    place = min(max(0, place), nbytes)
    return place if apart and place == nbytes else place // PAGE * PAGE
