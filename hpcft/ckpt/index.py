"""What a restore reads instead of asking libhdf5: what every leaf is, where it lies, its checksum.

HDF5 libraries have crashed on files that were damaged or made to harm. So a restore does not use
one. The file's first page, which to HDF5 is the user block, says where the index is::

    offset  bytes
         0     64  a line of text for people
        64      8  version of the format, 3
        72      8  size of this file
        80      8  step
        88     24  the index:      offset, length, CRC-32C
       112     24  the pieces:     offset, length, CRC-32C
       136     24  the checksums:  offset, length, CRC-32C
       160      8  CRC-32C of the bytes before

All numbers are unsigned and little-endian, of 8 bytes. The three are datasets of the HDF5 file,
too: ``/hpcft/index`` is JSON (structure, leaves, and names and sizes of the shard files),
``/hpcft/checksums`` a CRC-32C a leaf, and behind these one a piece. ``/hpcft/pieces`` says where
the bytes of the leaves are, in rows of five numbers: leaf, first byte of it, length, file, offset
there. File 0 is the one with the index; if it is the only one, that is one row a leaf. A leaf is
the full tensor, also if ranks held shards of it; how it was cut is not said.

Everything read is checked before it is used: the checksums against the bytes, pieces against the
leaves and the sizes of the files, the structure against its grammar. What is wrong raises
:class:`Damaged`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from hpcft.ckpt import dtypes
from hpcft.ckpt._engine import crc32c
from hpcft.ckpt.filesystem import Layout
from hpcft.ckpt.spec import DEEPEST, Node, Spec
from hpcft.errors import HpcftError

VERSION = 3
#: The group of the file that is not the user's.
OWN = "hpcft"
_TEXT = b"hpcft checkpoint; an HDF5 file (user block of 4096 bytes)\n".ljust(64, b"\0")
#: What the first page of the other files says.
SHARD_TEXT = b"part of an hpcft checkpoint, which state.h5 beside it describes\n"
_HEADER = struct.Struct("<64s3Q9Q")
HEADER_SIZE = _HEADER.size + 8
#: Longer than any that is meant well.
_LONGEST = 1 << 30
#: Nothing is so long or so far; sums of two such numbers fit 63 bits.
_FARTHEST = 1 << 62
#: Names of shard files: nothing that leads elsewhere.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_KINDS = {
    "tensor", "ndarray", "none", "bool", "int", "float", "str", "bytes", "bigint",
    "intlist", "inttuple", "floatlist", "floattuple",
}  # fmt: skip


class Damaged(HpcftError):
    """A checkpoint's file is not what was once written, or never was a checkpoint.

    Parameters
    ----------
    files: names of those in which bytes are wrong, or which cannot be read.
    """

    def __init__(self, message: str, remedy: str = "", files: Sequence[str] = ()) -> None:
        super().__init__(message, remedy)
        self.files = tuple(files)

    def __reduce__(self) -> tuple[type[Damaged], tuple[object, ...]]:
        return type(self), (self.message, self.remedy, self.files)


@dataclass(frozen=True)
class Stretch:
    """Bytes of the file, and their checksum."""

    offset: int
    length: int
    checksum: int


@dataclass(frozen=True)
class Header:
    """What the first page says."""

    size: int
    step: int
    index: Stretch
    pieces: Stretch
    checksums: Stretch

    def encode(self) -> bytes:
        """The header's bytes."""
        parts = (self.index, self.pieces, self.checksums)
        numbers = [n for part in parts for n in (part.offset, part.length, part.checksum)]
        body = _HEADER.pack(_TEXT, VERSION, self.size, self.step, *numbers)
        return body + struct.pack("<Q", crc32c(body))

    @classmethod
    def decode(cls, data: bytes, size: int) -> Header:
        """The header in a file of ``size`` bytes that begins with ``data``.

        Raises
        ------
        Damaged: there is none, or it is not this file's.
        """
        if data.startswith(SHARD_TEXT):
            raise Damaged("this is one rank's part of a checkpoint", "name state.h5 beside it")
        if len(data) < HEADER_SIZE or data[: len(_TEXT)] != _TEXT:
            raise Damaged("this is not a checkpoint of hpcft")
        body = data[: _HEADER.size]
        if crc32c(body) != struct.unpack_from("<Q", data, _HEADER.size)[0]:
            raise Damaged("the first page is damaged")
        _, version, said, step, *numbers = _HEADER.unpack(body)
        if version != VERSION:
            raise Damaged(f"the format's version is {version}", "use the hpcft that wrote it")
        if said != size:
            raise Damaged(f"the file has {size} bytes and should have {said}")
        parts = [Stretch(*numbers[i : i + 3]) for i in (0, 3, 6)]
        if any(p.length > _LONGEST or p.offset + p.length > size for p in parts):
            raise Damaged("the first page points past the end of the file")
        return cls(size, step, *parts)


@dataclass(frozen=True)
class File:
    """One of a checkpoint's files: its name, and its size in bytes."""

    name: str
    size: int


class Piece(NamedTuple):
    """Where ``length`` bytes of a leaf are: those from ``begin`` on.

    file: its number.
    offset: in that file.
    """

    leaf: int
    begin: int
    length: int
    file: int
    offset: int


_COLUMNS = len(Piece._fields)


@dataclass(frozen=True, eq=False)
class Index:
    """The leaves of a checkpoint.

    structure: how they make up the tree.
    files: those it consists of; the first has the index.
    table: all pieces, a row each, of shape (n, 5), ordered by leaf and place in it.
    checksums: CRC-32C of each leaf's bytes.
    piece_checksums: CRC-32C of each piece's bytes, by which a damaged file is told from others.
    """

    structure: Node
    specs: tuple[Spec, ...]
    files: tuple[File, ...]
    table: np.ndarray[Any, Any]
    checksums: tuple[int, ...]
    piece_checksums: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        """Of the files."""
        return "per-rank" if len(self.files) > 1 else "shared"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @cached_property
    def _first_rows(self) -> list[int]:
        """Where in the table each leaf begins, and the end."""
        found: list[int] = np.searchsorted(
            self.table[:, 0], np.arange(len(self.specs) + 1)
        ).tolist()
        return found

    def pieces(self, leaf: int, begin: int = 0, end: int = _FARTHEST) -> Iterator[Piece]:
        """Where bytes ``begin`` to ``end`` of a leaf are, in order."""
        rows = self.table[self._first_rows[leaf] : self._first_rows[leaf + 1]]
        if begin:
            # The pieces that end after it.
            rows = rows[np.searchsorted(rows[:, 1] + rows[:, 2], begin, "right") :]
        for row in rows.tolist():
            piece = Piece(*row)
            if piece.begin >= end:
                return
            before = max(0, begin - piece.begin)
            length = min(end, piece.begin + piece.length) - piece.begin - before
            yield Piece(leaf, piece.begin + before, length, piece.file, piece.offset + before)

    def leaves_in(self, file: int) -> list[str]:
        """The paths of the leaves of which bytes are in a file."""
        numbers = np.unique(self.table[self.table[:, 3] == file, 0])
        return [self.specs[leaf].path for leaf in numbers.tolist()]


def encode(structure: Node, specs: Sequence[Spec], shards: Iterable[File] = ()) -> bytes:
    """The JSON that does not change from save to save.

    Parameters
    ----------
    shards: the files besides the one with the index.
    """
    content = {
        "structure": structure,
        "leaves": [[s.path, s.kind, s.dtype, list(s.shape)] for s in specs],
        "shards": [[file.name, file.size] for file in shards],
    }
    return json.dumps(content, separators=(",", ":")).encode()


def encode_pieces(pieces: Iterable[Piece]) -> bytes:
    """The rows of the pieces, in order."""
    return np.array(sorted(pieces), "<u8").tobytes()


def decode(text: bytes, pieces: bytes, checksums: bytes, own: File) -> Index:
    """The index, from its three parts.

    Parameters
    ----------
    own: the file they are from.

    Raises
    ------
    Damaged: they are not what they should be, or do not fit each other.
    """
    try:
        content = json.loads(text)
        leaves, structure = content["leaves"], content["structure"]
        specs = tuple(_spec(*leaf) for leaf in leaves)
        files = (own, *(_file(*shard) for shard in content["shards"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"the index is damaged: {error!r}") from error
    if len({file.name for file in files}) != len(files):
        raise Damaged("the index is damaged: a file twice")
    rows, rest = divmod(len(pieces), 8 * _COLUMNS)
    if rest or len(checksums) != 4 * (len(specs) + rows):
        raise Damaged("the index is damaged: its parts differ in length")
    table = _table(pieces, specs, files)
    sums = tuple(np.frombuffer(checksums, "<u4").tolist())
    seen: set[int] = set()
    _check(structure, len(specs), seen, 0)
    if len(seen) != len(specs):
        raise Damaged("the index is damaged: leaves belong nowhere")
    return Index(structure, specs, files, table, sums[: len(specs)], sums[len(specs) :])


def _file(name: Any, size: Any) -> File:
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ValueError(f"no file's name: {name!r}"[:200])
    if type(size) is not int or not 0 <= size < _FARTHEST:
        raise ValueError(f"no size: {size!r}"[:200])
    return File(name, size)


def _table(pieces: bytes, specs: Sequence[Spec], files: Sequence[File]) -> np.ndarray[Any, Any]:
    """The pieces, which make up every leaf, and do not lie on each other.

    Otherwise a small file could ask for any amount of memory.
    """
    raw = np.frombuffer(pieces, "<u8").reshape(-1, _COLUMNS)
    if (raw >= _FARTHEST).any() or any(spec.nbytes >= _FARTHEST for spec in specs):
        raise Damaged("the index is damaged: pieces past all ends")
    table = raw.astype(np.int64)
    leaf, begin, length, file, offset = table.T
    if (leaf >= len(specs)).any() or (file >= len(files)).any() or (length == 0).any():
        raise Damaged("the index is damaged: pieces of what there is not")
    past = np.flatnonzero(offset + length > np.array([f.size for f in files])[file])
    if past.size:
        one = past[0]
        path, name = specs[leaf[one]].path, files[file[one]].name
        raise Damaged(f"{path} lies past the end of {name}")
    # Each begins where the one before has ended, or with a new leaf.
    new = np.diff(leaf, prepend=-1) != 0
    ends = begin + length
    follows = np.where(new, begin == 0, begin == np.roll(ends, 1))
    last = np.append(new[1:], True)[: len(table)]
    sizes = np.array([spec.nbytes for spec in specs], np.int64)
    if (
        (np.diff(leaf) < 0).any()
        or not follows.all()
        or (ends != sizes[leaf])[last].any()
        or int(new.sum()) != int((sizes > 0).sum())
    ):
        raise Damaged("the index is damaged: pieces do not make up the leaves")
    order = np.lexsort((offset, file))
    together = np.diff(file[order]) == 0
    if (together & (np.diff(offset[order]) < length[order][:-1])).any():
        raise Damaged("the index is damaged: leaves lie on each other")
    return table


def _spec(path: Any, kind: Any, dtype: Any, shape: Any) -> Spec:
    if not isinstance(path, str) or kind not in _KINDS or not isinstance(shape, list):
        raise ValueError(f"no leaf: {path!r} {kind!r} {shape!r}"[:200])
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < _FARTHEST for n in shape):
        raise ValueError(f"no shape: {shape!r}"[:200])
    dtypes.item_size(dtype)
    if kind not in ("tensor", "ndarray"):
        expected = {"none": "uint8", "bool": "bool", "str": "uint8", "bytes": "uint8"}
        is_list = kind.endswith(("list", "tuple")) or kind in ("str", "bytes", "bigint")
        wanted = expected.get(kind, "float64" if kind.startswith("float") else "int64")
        if kind == "bigint":
            wanted = "uint8"
        if dtype != wanted or len(shape) != int(is_list):
            raise ValueError(f"{path!r} is no {kind}"[:200])
    return Spec(path, kind, dtype, tuple(shape))


def _check(node: Any, count: int, seen: set[int], depth: int) -> None:
    """See that a structure keeps to the grammar and names every leaf once."""
    if type(node) is int:
        if not 0 <= node < count or node in seen:
            raise Damaged("the index is damaged: a leaf that is none, or twice")
        seen.add(node)
        return
    if depth > DEEPEST or not isinstance(node, list) or len(node) != 2:
        raise Damaged("the index is damaged: no structure")
    kind, content = node
    if not isinstance(content, list):
        raise Damaged("the index is damaged: no structure")
    if kind in ("dict", "intdict"):
        key_type = int if kind == "intdict" else str
        for item in content:
            if not isinstance(item, list) or len(item) != 2 or type(item[0]) is not key_type:
                raise Damaged("the index is damaged: no structure")
        if len({item[0] for item in content}) != len(content):
            raise Damaged("the index is damaged: a key twice")
        content = [item[1] for item in content]
    elif kind not in ("list", "tuple"):
        raise Damaged("the index is damaged: no structure")
    for item in content:
        _check(item, count, seen, depth + 1)
