"""Which rank writes which bytes of a checkpoint's file.

Replicated state is written once: the large leaves are cut into equal parts, one a rank, at page
boundaries, so that no page is two ranks' and all parts can go past the page cache. What is small
is rank 0's, and so is what is left of a large leaf after its last whole page, for a small one can
lie behind it; and the metadata, which comes last because it holds the checksums.

Sharded leaves are cut at page boundaries, too. Where each shard is one run of the tensor (cut along
the first dimension, as FSDP does), a rank writes its own shard, and only what lies before its first
page boundary is the part of the rank before. Where shards are many runs each rank has an equal part
of the tensor. What a rank lacks of its part the ranks exchange. So no file system ever sees two
ranks write one page (over NFS one of them would undo what the other has written), and rows of a few
bytes are no small transfers.

Where each rank writes a file of its own the parts are nearly the same; only that what is left of a
leaf after its last whole page belongs to its last part. A rank then has one part of a leaf at most.

The same parts serve a restore, in which every byte is read by one rank and then goes to those that
hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hpcft.ckpt import dtypes
from hpcft.ckpt._engine import crc32c_combine
from hpcft.ckpt.division import Common, Cut, Division, boundary
from hpcft.ckpt.layout import LARGE, PAGE, Layout
from hpcft.ckpt.shards import Runs, Shard, holdings
from hpcft.ckpt.spec import Spec
from hpcft.errors import HpcftError


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


#: Of the leaves that are sharded, by their numbers: who holds what.
Held = Mapping[int, Division]


def held(specs: Sequence[Spec], everybodys: Sequence[Mapping[int, Shard]]) -> Held:
    """Who holds what, from what each rank holds of the leaves that are sharded.

    Raises
    ------
    HpcftError: there is a leaf that the shards do not make up.
    """
    # By identity: to compare hundreds of shards for each of thousands of leaves takes long, and
    # what one rank says of leaves of one kind is one object.
    kinds: dict[Hashable, Division] = {}
    found = {}
    for leaf in sorted(set().union(*everybodys)):
        spec, theirs = specs[leaf], [shards.get(leaf) for shards in everybodys]
        item = dtypes.item_size(spec.dtype)
        kind = spec.shape, item, tuple(map(id, theirs))
        if kind not in kinds:
            division = kinds[kind] = Division(spec.shape, item, holdings(theirs))
            if not division.complete:
                raise HpcftError(
                    f"the ranks' shards of {spec.path} do not make up the tensor",
                    "track only what is cut over all ranks",
                )
        found[leaf] = kinds[kind]
    return found


def divided(spec: Spec) -> bool:
    """Whether a leaf is all ranks' to write, and not rank 0's alone."""
    return spec.nbytes >= LARGE and spec.kind in ("tensor", "ndarray")


def share(
    specs: Sequence[Spec], rank: int, size: int, held: Held | None = None, apart: bool = False
) -> list[Part]:
    """The parts that ``rank`` of ``size`` writes.

    Parameters
    ----------
    held: of the leaves that not every rank holds as a whole.
    apart: each rank writes a file of its own.
    """
    held = held or {}
    large = [i for i, spec in enumerate(specs) if divided(spec) and i not in held]
    total = sum(specs[i].nbytes for i in large)
    low, high = total * rank // size, total * (rank + 1) // size
    parts = []
    if rank == 0:
        others = (i for i, spec in enumerate(specs) if i not in held and not divided(spec))
        parts = [Part(i, 0, specs[i].nbytes) for i in others if specs[i].nbytes]
    before = 0
    for leaf in large:
        nbytes = specs[leaf].nbytes
        begin, end = (boundary(limit - before, nbytes, apart) for limit in (low, high))
        if rank == 0 and not apart:
            if end == (pages_end := boundary(nbytes, nbytes)):
                end = nbytes
            elif pages_end < nbytes:
                parts.append(Part(leaf, pages_end, nbytes))
        if begin < end:
            parts.append(Part(leaf, begin, end))
        before += nbytes
    own: dict[Division, list[Cut]] = {}
    for leaf, division in held.items():
        if division not in own:
            own[division] = [cut for cut in division.cuts(apart) if cut.owner == rank]
        parts += [Part(leaf, cut.begin, cut.end) for cut in own[division]]
    return parts


@dataclass(frozen=True)
class Overlap:
    """What a part and a shard have in common.

    part, owner: the part, and the rank that moves it to or from the file.
    holders: the ranks that hold the shard.
    begin, end: in the shard's memory.
    runs: in the leaf.
    """

    part: Part
    owner: int
    holders: tuple[int, ...]
    begin: int
    end: int
    runs: Runs


#: Of a leaf: who moves which part of it to or from a file, in order.
Owned = Callable[[int], Iterable[tuple[int, Part]]]


def overlaps(
    specs: Sequence[Spec],
    rank: int,
    held: Held,
    apart: bool = False,
    owned: Owned | None = None,
) -> list[Overlap]:
    """All overlaps that concern ``rank``, in an order on which all ranks agree.

    Parameters
    ----------
    apart: the parts are those of files of each rank's own.
    owned: who has which parts, if it is not for this module to say.
    """
    kinds: dict[Division, list[Common]] = {}
    found = []
    for leaf, division in held.items():
        if owned:
            cuts = [Cut(owner, part.begin, part.end) for owner, part in owned(leaf)]
            common = division.common(rank, cuts)
        elif division in kinds:
            common = kinds[division]
        else:
            common = kinds[division] = division.common(rank, division.cuts(apart))
        for (owner, *part), holders, begin, end, runs in common:
            found.append(Overlap(Part(leaf, *part), owner, holders, begin, end, runs))
    return found


def fillers(layout: Layout, parts: Iterable[Part]) -> list[tuple[int, int]]:
    """Unused bytes behind parts, as (offset, length), with which the last page is whole."""
    taken = sorted(
        [place for place in layout.places if place]
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


def joined(spans: Iterable[Part], summed: Iterable[Summed]) -> list[int]:
    """The checksum of every span from those of the parts that make it up.

    Parameters
    ----------
    spans: ordered, and none on another.
    summed: the parts, in any order. A span may have none; its checksum is 0.

    Raises
    ------
    ValueError: the parts do not make up the spans.
    """
    parts = sorted(summed, key=lambda one: (one.part.leaf, one.part.begin))
    sums, i = [], 0
    for span in spans:
        end, checksum = span.begin, 0
        while i < len(parts) and (part := parts[i].part).leaf == span.leaf and end < span.end:
            if part.begin != end or part.end > span.end:
                raise ValueError(f"the parts of leaf {span.leaf} do not meet at {end}")
            checksum = crc32c_combine(checksum, parts[i].checksum, part.end - part.begin)
            end, i = part.end, i + 1
        if span.begin < end < span.end:
            raise ValueError(f"leaf {span.leaf} has an end that nobody has")
        sums.append(checksum)
    if i < len(parts):
        raise ValueError(f"nobody has asked for a part of leaf {parts[i].part.leaf}")
    return sums


def combine(specs: Sequence[Spec], summed: Iterable[Summed]) -> list[int]:
    """The checksum of every leaf from those of its parts; 0 for a leaf of which there is none.

    Raises
    ------
    ValueError: the parts of a leaf do not make it up.
    """
    return joined((Part(i, 0, spec.nbytes) for i, spec in enumerate(specs)), summed)
