"""Which rank writes which bytes of a checkpoint's file.

Replicated state is written once: the large leaves are cut into equal parts, one a rank, at page
boundaries, so that no page is two ranks' and all parts can go past the page cache. What is small
is rank 0's, as is the metadata, which comes last because it holds the checksums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpcft.ckpt._engine import crc32c_combine
from hpcft.ckpt.layout import LARGE, PAGE, Layout
from hpcft.ckpt.spec import Spec


@dataclass(frozen=True)
class Part:
    """Bytes ``begin`` to ``end`` of a leaf."""

    leaf: int
    begin: int
    end: int


@dataclass(frozen=True)
class Summed:
    """A part that is written, and its CRC-32C."""

    part: Part
    checksum: int


def share(specs: Sequence[Spec], rank: int, size: int) -> list[Part]:
    """The parts that ``rank`` of ``size`` writes."""
    large = [i for i, spec in enumerate(specs) if spec.nbytes >= LARGE]
    total = sum(specs[i].nbytes for i in large)
    low, high = total * rank // size, total * (rank + 1) // size
    parts = []
    if rank == 0:
        parts = [Part(i, 0, s.nbytes) for i, s in enumerate(specs) if 0 < s.nbytes < LARGE]
    before = 0
    for leaf in large:
        nbytes = specs[leaf].nbytes
        begin, end = (_cut(limit - before, nbytes) for limit in (low, high))
        if begin < end:
            parts.append(Part(leaf, begin, end))
        before += nbytes
    return parts


def _cut(place: int, nbytes: int) -> int:
    """The page boundary at or before ``place`` in a leaf, or one of its ends."""
    return nbytes if place >= nbytes else max(0, place) // PAGE * PAGE


def fillers(layout: Layout, parts: Iterable[Part]) -> list[tuple[int, int]]:
    """Unused bytes behind parts, as (offset, length), with which the last page is whole."""
    taken = sorted(
        [place for place, spec in zip(layout.places, layout.specs, strict=True) if spec.nbytes]
        + [offset for offset, _ in layout.metadata]
        + [layout.size]
    )
    following = dict(pairwise(taken))
    found = []
    for part in parts:
        spec, place = layout.specs[part.leaf], layout.places[part.leaf]
        end = place + part.end
        page_end = -(-end // PAGE) * PAGE
        if part.end == spec.nbytes >= LARGE and end < page_end <= following[place]:
            found.append((end, page_end - end))
    return found


def combine(specs: Sequence[Spec], summed: Iterable[Summed]) -> list[int]:
    """The checksum of every leaf from those of its parts."""
    sums = [0] * len(specs)
    for one in sorted(summed, key=lambda s: (s.part.leaf, s.part.begin)):
        part = one.part
        sums[part.leaf] = crc32c_combine(sums[part.leaf], one.checksum, part.end - part.begin)
    return sums
