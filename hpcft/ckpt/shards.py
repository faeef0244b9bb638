"""Where the bytes of a shard lie in the whole tensor.

A shard is, along every dimension of the tensor, some stretches of indices; its memory holds these
in the tensor's order, row by row. So the bytes that a shard and a stretch of the whole tensor have
in common are one stretch of the shard's memory, however many runs they are in the tensor.

How a tensor is cut over a mesh of ranks is that of PyTorch's DTensor (``torch.chunk`` along one
dimension of the tensor for each dimension of the mesh, in order).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Split:
    """How one dimension of a mesh cuts a tensor.

    dim: along which dimension of the tensor.
    within: into so many chunks the tensor is cut first, and each of these over the mesh (what
        DTensor calls a strided shard: a tensor-parallel weight that is then cut by FSDP).
    """

    dim: int
    within: int = 1


@dataclass(frozen=True)
class Shard:
    """A part of a tensor.

    spans: for each dimension its stretches of indices (begin, end), ascending, none empty.
    """

    spans: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(sum(end - begin for begin, end in spans) for spans in self.spans)

    @classmethod
    @cache
    def whole(cls, shape: tuple[int, ...]) -> Shard:
        """The tensor itself; of leaves of one shape one object, as with :meth:`of`."""
        return cls(tuple(((0, length),) if length else () for length in shape))

    @classmethod
    @cache
    def of(
        cls,
        shape: tuple[int, ...],
        mesh: tuple[int, ...],
        place: tuple[int, ...],
        splits: tuple[Split | None, ...],
    ) -> Shard:
        """The shard of the rank at ``place`` in a mesh.

        Of leaves that are cut in the same way it is one object: little to send, and quickly
        compared.

        Parameters
        ----------
        shape: of the whole tensor.
        mesh: ranks along each dimension of the mesh.
        splits: what each dimension of the mesh does; None: all its ranks hold the same.
        """
        spans = list(cls.whole(shape).spans)
        for count, number, split in zip(mesh, place, splits, strict=True):
            if split:
                held = spans[split.dim]
                chunks = [_chunk(held, split.within, i) for i in range(split.within)]
                spans[split.dim] = _joined(
                    span for chunk in chunks for span in _chunk(chunk, count, number)
                )
        return cls(tuple(spans))


def _chunk(spans: Sequence[tuple[int, int]], count: int, number: int) -> list[tuple[int, int]]:
    """One of ``count`` chunks of what the spans hold, as ``torch.chunk`` cuts it."""
    total = sum(end - begin for begin, end in spans)
    step = -(-total // count)
    low, high = min(step * number, total), min(step * (number + 1), total)
    chunk = []
    for begin, end in spans:
        first, last = begin + max(low, 0), min(end, begin + high)
        if first < last:
            chunk.append((first, last))
        low, high = low - (end - begin), high - (end - begin)
    return chunk


def _joined(spans: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and joined[-1][1] == begin:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return tuple(joined)


@dataclass(frozen=True)
class Runs:
    """Stretches of a tensor's bytes, ascending; each as long as possible.

    begins, ends: in the whole tensor.
    """

    begins: Numbers
    ends: Numbers

    @classmethod
    def of(cls, shape: Sequence[int], item: int, shard: Shard) -> Runs:
        """Those of a shard.

        Parameters
        ----------
        item: bytes of an element.
        """
        if 0 in shard.shape:
            return cls(np.empty(0, np.int64), np.empty(0, np.int64))
        # The last dimension that is not held as a whole decides on the runs' length.
        last = len(shape)
        while last and shard.spans[last - 1] == ((0, shape[last - 1]),):
            last -= 1
        starts = np.zeros(1, np.int64)
        stride = item
        for length in shape[last:]:
            stride *= length
        if not last:
            return cls(starts, starts + stride)
        strides = [stride]
        for length in reversed(shape[1:last]):
            strides.append(strides[-1] * length)
        for spans, step in zip(shard.spans[: last - 1], reversed(strides[1:]), strict=True):
            indices = np.concatenate([np.arange(begin, end) for begin, end in spans])
            starts = (starts[:, None] + indices * step).reshape(-1)
        bounds = np.array(shard.spans[last - 1], np.int64) * stride
        begins = (starts[:, None] + bounds[:, 0]).reshape(-1)
        ends = (starts[:, None] + bounds[:, 1]).reshape(-1)
        return cls(begins, ends)

    @cached_property
    def before(self) -> Numbers:
        """Bytes in the runs before each, and in all."""
        return np.concatenate([[0], np.cumsum(self.ends - self.begins)])

    def between(self, begin: int, end: int) -> tuple[int, int]:
        """What of the runs' bytes, counted without the gaps, lies in ``begin`` to ``end``."""
        return self._count(begin), self._count(end)

    def _count(self, place: int) -> int:
        """The runs' bytes before a place in the tensor."""
        number = int(np.searchsorted(self.begins, place))
        if not number:
            return 0
        inside = min(place, int(self.ends[number - 1])) - int(self.begins[number - 1])
        return int(self.before[number - 1]) + inside

    def within(self, begin: int, end: int) -> Runs:
        """What of them lies in ``begin`` to ``end``."""
        first = int(np.searchsorted(self.ends, begin, "right"))
        last = int(np.searchsorted(self.begins, end))
        return Runs(
            np.maximum(self.begins[first:last], begin), np.minimum(self.ends[first:last], end)
        )


@dataclass(frozen=True)
class Holding:
    """A shard and the ranks that hold it, in order."""

    shard: Shard
    ranks: tuple[int, ...]


def holdings(everybodys: Sequence[Shard | None]) -> tuple[Holding, ...]:
    """The different shards of a tensor, from those of all ranks; empty ones are left out."""
    ranks: dict[Shard, list[int]] = {}
    for rank, shard in enumerate(everybodys):
        if shard is not None and 0 not in shard.shape:
            ranks.setdefault(shard, []).append(rank)
    return tuple(Holding(shard, tuple(held_by)) for shard, held_by in ranks.items())
