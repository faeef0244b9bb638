"""Making anew what a lost node had, from what the others of its set have; collective."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcft.ckpt.parity import CHUNK, Parity, slot, stripes
from hpcft.ckpt.ranks import Memory, Ranks

#: Stripes for which the ranks send each other what is needed at a time.
_STRIPES_AT_ONCE = 16


@dataclass(frozen=True)
class Source:
    """Something that a file is made from.

    rank: who reads it.
    member: of the set, whose file it is, or who keeps the parity.
    size: in bytes.
    path: where, for ``rank``.
    """

    rank: int
    member: int
    size: int
    path: Path


@dataclass(frozen=True)
class Recipe:
    """How to make a file.

    member: of the set, whose file it was.
    size: of the file.
    members: the set.
    files: those of the others; one who has none is left out.
    parities: what the others keep.
    """

    member: int
    size: int
    members: tuple[int, ...]
    files: tuple[Source, ...]
    parities: tuple[Source, ...]


def matching(parities: list[tuple[int, Parity]], name: str) -> dict[int, tuple[int, Parity]]:
    """By its owner the parity with which a file can be made; none if some is missing.

    Parameters
    ----------
    parities: each with a rank that can read it.
    """
    found = {parity.owner: (rank, parity) for rank, parity in parities if name in parity.names}
    for _, parity in found.values():
        lost = parity.members[parity.names.index(name)]
        mine = {owner: one for owner, one in found.items() if one[1].members == parity.members}
        if mine.keys() == set(parity.members) - {lost}:
            return mine
    return {}


def rebuild(ranks: Ranks, recipe: Recipe, maker: int, target: Path) -> None:
    """Make a file; collective.

    Parameters
    ----------
    maker: the rank that does, and has it then at ``target``.

    Raises
    ------
    OSError: in the maker: it cannot be written. What cannot be read counts as zeros, so that the
        file's checksums will be wrong.
    """
    width = len(recipe.members) - 1
    error: OSError | None = None
    for first in range(0, stripes(recipe.size, len(recipe.members)), _STRIPES_AT_ONCE):
        # The bytes of some stripes: a file has as many chunks in each as there are keepers.
        low, high = first * CHUNK, (first + _STRIPES_AT_ONCE) * CHUNK
        wanted = [(source, low * width, high * width) for source in recipe.files]
        wanted += [(source, low, high) for source in recipe.parities]
        outgoing: list[list[Memory]] = [[] for _ in range(ranks.size)]
        incoming: list[list[Memory]] = [[] for _ in range(ranks.size)]
        here: list[Memory] = []
        for source, begin, end in wanted:
            length = max(0, min(end, source.size) - begin)
            memory = np.zeros(length, np.uint8)
            if source.rank == ranks.rank:
                _read(source.path, begin, memory)
                if ranks.rank != maker:
                    outgoing[maker].append(memory)
            elif ranks.rank == maker:
                incoming[source.rank].append(memory)
            here.append(memory)
        ranks.exchange(outgoing, incoming)
        if ranks.rank == maker and not error:
            try:
                _write(target, recipe, first, here)
            except OSError as found:
                error = found
    if error:
        raise error


def _read(path: Path, begin: int, memory: Memory) -> None:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(begin)
        file.readinto(memory.data)


def _write(target: Path, recipe: Recipe, first: int, memories: list[Memory]) -> None:
    count = len(recipe.files)
    files = {s.member: m for s, m in zip(recipe.files, memories[:count], strict=True)}
    parities = {s.member: m for s, m in zip(recipe.parities, memories[count:], strict=True)}
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("r+b" if target.exists() else "w+b") as out:
        out.truncate(recipe.size)
        for place, chunk in _chunks(recipe, first, files, parities):
            out.seek(place)
            out.write(chunk)


def _chunks(
    recipe: Recipe, first: int, files: dict[int, Memory], parities: dict[int, Memory]
) -> Iterator[tuple[int, bytes]]:
    """The file's chunks in some stripes, and where each belongs."""
    members, width = recipe.members, len(recipe.members) - 1
    for keeper, parity in parities.items():
        for stripe in range(parity.size // CHUNK):
            begin = ((first + stripe) * width + slot(members, recipe.member, keeper)) * CHUNK
            length = min(recipe.size - begin, CHUNK)
            if length <= 0:
                break
            made = parity[stripe * CHUNK :][:length].copy()
            for member, content in files.items():
                if member != keeper:
                    at = (stripe * width + slot(members, member, keeper)) * CHUNK
                    piece = content[at : at + length]
                    made[: piece.size] ^= piece
            yield begin, made.tobytes()
