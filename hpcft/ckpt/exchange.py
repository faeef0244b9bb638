"""Between shards and parts: what a rank writes of a leaf is not always what it holds of it.

A rank has in memory the sections it writes to the file or reads from it. :func:`collect` brings
together in the sections what the ranks hold, :func:`distribute` is the way back. What goes to
another rank goes by host memory; what is on a device stays there else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpcft.ckpt import device
from hpcft.ckpt.device import Bytes
from hpcft.ckpt.plan import Overlap, Part
from hpcft.ckpt.ranks import Memory, Ranks
from hpcft.ckpt.shards import Runs

_NOTHING = np.empty(0, np.uint8)


class Section:
    """A part of a leaf in the memory of the rank that moves it to or from the file.

    Where every shard has one run in the part, that is a piece of its own: this rank's is the
    shard's memory itself, and nothing is copied. Else it is one piece of memory.

    Attributes
    ----------
    pieces: what it consists of, in order, with the memory of each.
    """

    def __init__(self, rank: int, part: Part, common: Sequence[Overlap], shard: Bytes) -> None:
        self.part = part
        self.pieces: list[tuple[Part, Bytes]] = []
        if any(len(overlap.runs.begins) > 1 for overlap in common):
            self.pieces = [(part, np.empty(part.end - part.begin, np.uint8))]
            return
        for overlap in sorted(common, key=lambda overlap: int(overlap.runs.begins[0])):
            begin, end = int(overlap.runs.begins[0]), int(overlap.runs.ends[0])
            mine = rank in overlap.holders
            memory: Bytes = np.empty(0 if mine else end - begin, np.uint8)
            if mine:
                memory = shard[overlap.begin : overlap.end]
            self.pieces.append((Part(part.leaf, begin, end), memory))

    def room(self, overlap: Overlap) -> Memory:
        """Where the overlap's bytes may be received; :meth:`put` is to follow."""
        direct = self._direct(overlap)
        if direct is None or device.on_device(direct):
            return np.empty(overlap.end - overlap.begin, np.uint8)
        return direct

    def put(self, overlap: Overlap, data: Bytes) -> None:
        """Take in the overlap's bytes."""
        direct = self._direct(overlap)
        if direct is None:
            spread, index = self._spread(overlap.runs)
            spread[index] = device.in_host(data).view(spread.dtype)
        else:
            device.put(direct, data)

    def take(self, overlap: Overlap) -> Bytes:
        """The overlap's bytes."""
        direct = self._direct(overlap)
        if direct is None:
            spread, index = self._spread(overlap.runs)
            found: Memory = spread[index].view(np.uint8)
            return found
        return direct

    def _direct(self, overlap: Overlap) -> Bytes | None:
        """The overlap's bytes in place, if they are a piece."""
        if len(overlap.runs.begins) == 1:
            for part, memory in self.pieces:
                if part.begin == overlap.runs.begins[0] and part.end == overlap.runs.ends[0]:
                    return memory
        return None

    def _spread(self, runs: Runs) -> tuple[Memory, np.ndarray[Any, Any]]:
        """The section's memory in items as large as the runs allow, and which are theirs."""
        [(part, memory)] = self.pieces
        assert not device.on_device(memory)
        begins, lengths = runs.begins - part.begin, runs.ends - runs.begins
        item = int(np.gcd.reduce(np.concatenate([begins, lengths])))
        begins, lengths = begins // item, lengths // item
        before = np.cumsum(lengths) - lengths
        index = np.repeat(begins - before, lengths) + np.arange(int(lengths.sum()))
        return memory[: memory.size // item * item].view(f"V{item}"), index


def sections(
    rank: int, parts: Sequence[Part], common: Sequence[Overlap], memories: Mapping[int, Bytes]
) -> dict[Part, Section]:
    """This rank's sections.

    Parameters
    ----------
    parts: of sharded leaves, this rank's.
    common: the overlaps that concern this rank.
    memories: of this rank's shards, by leaf.
    """
    concerned: dict[Part, list[Overlap]] = {part: [] for part in parts}
    for overlap in common:
        if overlap.owner == rank:
            concerned[overlap.part].append(overlap)
    return {
        part: Section(rank, part, mine, memories.get(part.leaf, _NOTHING))
        for part, mine in concerned.items()
    }


def collect(
    ranks: Ranks,
    common: Sequence[Overlap],
    own: Mapping[Part, Section],
    memories: Mapping[int, Bytes],
) -> None:
    """Fill the sections with what the ranks hold; collective."""
    outgoing: list[list[Memory]] = [[] for _ in range(ranks.size)]
    incoming: list[list[Memory]] = [[] for _ in range(ranks.size)]
    arriving = []
    for overlap in common:
        # Of several that hold it the owner itself, else each at times.
        holders, owner = overlap.holders, overlap.owner
        source = owner if owner in holders else holders[owner % len(holders)]
        if source == ranks.rank:
            held = memories[overlap.part.leaf][overlap.begin : overlap.end]
            if owner == ranks.rank:
                own[overlap.part].put(overlap, held)
            else:
                outgoing[owner].append(device.in_host(held))
        elif owner == ranks.rank:
            room = own[overlap.part].room(overlap)
            incoming[source].append(room)
            arriving.append((overlap, room))
    ranks.exchange(outgoing, incoming)
    for overlap, room in arriving:
        own[overlap.part].put(overlap, room)


def distribute(
    ranks: Ranks,
    common: Sequence[Overlap],
    own: Mapping[Part, Section],
    memories: Mapping[int, Bytes],
) -> None:
    """Give what the sections have to all that hold it; collective."""
    outgoing: list[list[Memory]] = [[] for _ in range(ranks.size)]
    incoming: list[list[Memory]] = [[] for _ in range(ranks.size)]
    arriving = []
    for overlap in common:
        held = overlap.part.leaf, slice(overlap.begin, overlap.end)
        if overlap.owner == ranks.rank:
            data = own[overlap.part].take(overlap)
            others = [holder for holder in overlap.holders if holder != ranks.rank]
            if len(others) < len(overlap.holders):
                device.put(memories[held[0]][held[1]], data)
            sent = device.in_host(data) if others else _NOTHING
            for holder in others:
                outgoing[holder].append(sent)
        elif ranks.rank in overlap.holders:
            mine = memories[held[0]][held[1]]
            room = np.empty(len(mine), np.uint8) if device.on_device(mine) else mine
            incoming[overlap.owner].append(room)
            arriving.append((mine, room))
    ranks.exchange(outgoing, incoming)
    for mine, room in arriving:
        device.put(mine, room)
