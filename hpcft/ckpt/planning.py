"""What a save writes where, on which the ranks agree before the first of the same shapes.

Which parts are whose :mod:`hpcft.ckpt.plan` says, what the files look like :mod:`hpcft.ckpt.layout`
and :mod:`hpcft.ckpt.master`; here that is put together, by ranks that may differ in what they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcft.ckpt import dtypes, layout, master, plan
from hpcft.ckpt.device import Bytes
from hpcft.ckpt.index import SHARD_TEXT
from hpcft.ckpt.layout import PAGE, Layout
from hpcft.ckpt.master import Master, Written
from hpcft.ckpt.plan import Overlap, Part
from hpcft.ckpt.ranks import Ranks
from hpcft.ckpt.shards import Shard
from hpcft.ckpt.spec import Node, Spec
from hpcft.ckpt.store import STATE, shard
from hpcft.errors import HpcftError


class Unplannable(HpcftError):
    """Some rank could not plan its part; the same in all ranks."""


@dataclass(frozen=True)
class Shape:
    """What a state looks like to a rank; a plan is good for all of the same shape.

    structure, specs: of its leaves.
    shards: what this rank holds, of the leaves that are sharded.
    """

    structure: Node
    specs: list[Spec]
    shards: dict[int, Shard]


@dataclass(frozen=True)
class OwnFile:
    """The file of this rank alone.

    parts: of leaves, in the layout's order.
    """

    name: str
    layout: Layout
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Move:
    """What goes to a stretch of a file.

    part: what of the state it is; None: nothing.
    memory: None for zeros.
    """

    file: int
    offset: int
    length: int
    part: Part | None
    memory: Bytes | bytes | None


@dataclass(frozen=True)
class Plan:
    """A save, as a rank sees it.

    master: of the file that says where everything is; the same in all ranks.
    own: this rank's file, if it has one of its own.
    whole: what this rank writes of leaves that all hold.
    cut: what it writes of those that are sharded.
    common: what shards and parts have in common.
    """

    shape: Shape
    master: Master
    own: OwnFile | None
    whole: list[Part]
    cut: list[Part]
    common: list[Overlap]

    def moves(self, pieces: Sequence[tuple[Part, Bytes]]) -> tuple[list[str], list[Move]]:
        """The files to which this rank writes, and what, in order.

        Parameters
        ----------
        pieces: of its parts, with the memory of each.
        """
        own = self.own
        numbers = {part.leaf: i for i, part in enumerate(own.parts)} if own else {}
        shared = [(part, part, memory) for part, memory in pieces if part.leaf not in numbers]
        names = [STATE] if shared or not own else []
        moves = list(_into(self.master.layout, shared, 0))
        if own:
            file = len(names)
            names.append(own.name)
            inside = []
            for part, memory in pieces:
                if (number := numbers.get(part.leaf)) is not None:
                    begin = own.parts[number].begin
                    local = Part(number, part.begin - begin, part.end - begin)
                    inside.append((part, local, memory))
            moves += _into(own.layout, inside, file)
            page = SHARD_TEXT.ljust(PAGE, b"\0")
            for offset, content in ((0, page), *own.layout.metadata):
                moves.append(Move(file, offset, len(content), None, content))
        return names, sorted(moves, key=lambda move: (move.file, move.offset))


def make(ranks: Ranks, shape: Shape, apart: bool) -> Plan:
    """Plan saves of a shape; collective.

    Parameters
    ----------
    apart: each rank writes a file of its own.

    Raises
    ------
    Unplannable: the file system or the HDF5 library fails some rank.
    HpcftError: the ranks' states do not make up one.
    """
    specs = shape.specs
    theirs = ranks.share((shape.structure, specs) if ranks.rank == 0 else None)
    if not ranks.least(int(theirs == (shape.structure, specs))):
        raise HpcftError(
            "the ranks' states differ in names or shapes, and cannot be one checkpoint",
            "track only what is the same in all ranks",
        )
    held = plan.held(specs, ranks.share(ranks.gather(shape.shards)))
    parts = plan.share(specs, ranks.rank, ranks.size, held, apart)
    common = plan.overlaps(specs, ranks.rank, held, apart)
    own, written = _own_file(ranks, specs, parts) if apart else (None, [])
    made, why = None, ""
    if ranks.rank == 0:
        try:
            made = master.make(shape.structure, specs, written)
        except (OSError, RuntimeError, HpcftError) as error:
            why = str(error)
    # Rank 0's plan is everybody's, for another version of HDF5 may come to another.
    made, why = ranks.share((made, why))
    if made is None:
        raise Unplannable(f"no checkpoint can be planned: {why}")
    whole = [part for part in parts if part.leaf not in held]
    return Plan(shape, made, own, whole, [part for part in parts if part.leaf in held], common)


def _own_file(
    ranks: Ranks, specs: list[Spec], parts: list[Part]
) -> tuple[OwnFile | None, list[Written]]:
    """This rank's file, if it has any large part; and in rank 0 what all have in theirs."""
    parts = [part for part in parts if plan.divided(specs[part.leaf])]
    name, made, why = shard(ranks.rank), None, ""
    if parts:
        try:
            made = layout.make_shard([_flat(specs[part.leaf], part) for part in parts])
        except (OSError, RuntimeError, HpcftError) as error:
            why = str(error)
    mine = Written(name, made.size, list(zip(parts, made.places, strict=True))) if made else None
    everybodys = ranks.gather((mine, why))
    reasons = ranks.share([why for _, why in everybodys if why])
    if reasons:
        raise Unplannable(f"no checkpoint can be planned: {reasons[0]}")
    written = [theirs for theirs, _ in everybodys if theirs]
    return OwnFile(name, made, tuple(parts)) if made else None, written


def _flat(spec: Spec, part: Part) -> Spec:
    """A part as a leaf of its own."""
    count = (part.end - part.begin) // dtypes.item_size(spec.dtype)
    return Spec(spec.path, "tensor", spec.dtype, (count,))


def _into(made: Layout, pieces: Sequence[tuple[Part, Part, Bytes]], file: int) -> Iterator[Move]:
    """How pieces come into a file of this layout; each as a part of the state, and of the file."""
    for part, local, memory in pieces:
        offset = made.places[local.leaf] + local.begin
        yield Move(file, offset, local.end - local.begin, part, memory)
    for offset, length in plan.fillers(made, (local for _, local, _ in pieces)):
        yield Move(file, offset, length, None, None)
