"""The file that says where everything is, ``state.h5``; in the shared layout it is the only one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcft.ckpt import dtypes, layout
from hpcft.ckpt._engine import crc32c
from hpcft.ckpt.collector import paused
from hpcft.ckpt.index import OWN, File, Header, Piece, Stretch, encode, encode_pieces
from hpcft.ckpt.layout import PAGE, Layout
from hpcft.ckpt.plan import Part, Summed, combine, joined
from hpcft.ckpt.spec import Node, Spec
from hpcft.ckpt.store import STATE
from hpcft.ckpt.virtual import Source


@dataclass(frozen=True)
class Master:
    """What is in it, but for the checksums, as long as the shapes of the state do not change.

    layout: of the file.
    files: names of the checkpoint's files, this one first.
    text: the index's JSON.
    pieces: the index's table of pieces.
    own: numbers of the leaves index, pieces and checksums.
    """

    layout: Layout
    files: tuple[str, ...]
    text: bytes
    pieces: bytes
    own: tuple[int, int, int]

    @paused()
    def seal(self, step: int, summed: Iterable[Summed]) -> list[tuple[Any, int, int, int]]:
        """What is written when all checksums are known, as extents for the engine."""
        made, summed = self.layout, list(summed)
        sums = combine(made.specs, summed)
        table = np.frombuffer(self.pieces, "<u8").reshape(-1, len(Piece._fields))
        spans = [Part(leaf, begin, begin + length) for leaf, begin, length in table[:, :3].tolist()]
        of_pieces = joined(spans, summed)
        text_at, pieces_at, sums_at = self.own
        sums[text_at], sums[pieces_at] = crc32c(self.text), crc32c(self.pieces)
        # A checksum cannot be among what it is of; in the list its own is 0. The pieces of the
        # three are the last, and nobody asks for their checksums.
        checksums = np.array(sums + of_pieces, "<u4").tobytes()
        contents = {text_at: self.text, pieces_at: self.pieces, sums_at: checksums}
        stretches = {
            leaf: Stretch(made.places[leaf], len(content), crc32c(content))
            for leaf, content in contents.items()
        }
        sums[sums_at] = stretches[sums_at].checksum
        header = Header(
            made.size, step, stretches[text_at], stretches[pieces_at], stretches[sums_at]
        ).encode()
        extents = [(header.ljust(PAGE, b"\0"), 0, 0, PAGE)]
        extents += [
            (content, 0, made.places[leaf], len(content)) for leaf, content in contents.items()
        ]
        extents += [
            (bytes(content), 0, offset, len(content)) for offset, content in _patched(made, sums)
        ]
        return sorted(extents, key=lambda extent: extent[2])


@dataclass(frozen=True)
class Written:
    """What a rank has in its own file: parts, and where each is."""

    name: str
    size: int
    parts: list[tuple[Part, int]]


def make(structure: Node, specs: Sequence[Spec], written: Sequence[Written]) -> Master:
    """Plan it.

    Parameters
    ----------
    written: what is in the files of each rank's own, if there are such.

    Raises
    ------
    LayoutError: libhdf5 does not do as expected.
    """
    sources: dict[int, list[Source]] = {}
    pieces = []
    for number, one in enumerate(written, 1):
        for part, place in one.parts:
            pieces.append(Piece(part.leaf, part.begin, part.end - part.begin, number, place))
            spec = specs[part.leaf]
            begin, end = (n // dtypes.item_size(spec.dtype) for n in (part.begin, part.end))
            sources.setdefault(part.leaf, []).append(Source(begin, end, one.name, spec.path))
    here = [i for i, spec in enumerate(specs) if spec.nbytes and i not in sources]
    shards = [File(one.name, one.size) for one in written]
    text = b""
    # Its own length is part of it.
    while True:
        lengths = len(text), len(pieces) + len(here) + 3
        whole, all_specs = _with_own(structure, specs, *lengths)
        if len(text) == len(again := encode(whole, all_specs, shards)):
            break
        text = again
    own = (len(specs), len(specs) + 1, len(specs) + 2)
    made = layout.make(all_specs, sources)
    pieces += [Piece(i, 0, all_specs[i].nbytes, 0, made.places[i]) for i in (*here, *own)]
    names = (STATE, *(one.name for one in written))
    return Master(made, names, again, encode_pieces(pieces), own)


def _with_own(
    structure: Node, specs: Sequence[Spec], length: int, rows: int
) -> tuple[Node, list[Spec]]:
    """Structure and leaves with those that describe them.

    Parameters
    ----------
    length: of the index's JSON.
    rows: of the table of pieces.
    """
    count = len(specs)
    own = [
        Spec(f"/{OWN}/index", "ndarray", "uint8", (length,)),
        Spec(f"/{OWN}/pieces", "ndarray", "uint64", (rows, len(Piece._fields))),
        Spec(f"/{OWN}/checksums", "ndarray", "uint32", (count + 3 + rows,)),
    ]
    node = ["dict", [["index", count], ["pieces", count + 1], ["checksums", count + 2]]]
    assert isinstance(structure, list)
    kind, items = structure
    return [kind, [*items, [OWN, node]]], [*specs, *own]


def _patched(made: Layout, sums: list[int]) -> list[tuple[int, bytearray]]:
    """The metadata with every leaf's checksum in its attribute."""
    stretches = [(offset, bytearray(content)) for offset, content in made.metadata]
    starts = np.array([offset for offset, _ in stretches])
    where = np.searchsorted(starts, made.checksum_places, side="right") - 1
    for leaf, (number, place) in enumerate(zip(where, made.checksum_places, strict=True)):
        offset, content = stretches[number]
        content[place - offset : place - offset + 4] = sums[leaf].to_bytes(4, "little")
    return stretches
