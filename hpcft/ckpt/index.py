"""What a restore reads instead of asking libhdf5: where every leaf lies, what it is, its checksum.

HDF5 libraries have crashed on files that were damaged or made to harm. So a restore does not use
one. The file's first page, which to HDF5 is the user block, says where the index is::

    offset  bytes
         0     64  a line of text for people
        64      8  version of the format, 1
        72      8  size of the file
        80      8  step
        88     24  the index:      offset, length, CRC-32C
       112     24  the places:     offset, length, CRC-32C
       136     24  the checksums:  offset, length, CRC-32C
       160      8  CRC-32C of the bytes before

All numbers are unsigned and little-endian, of 8 bytes. The three are datasets of the HDF5 file,
too: ``/hpcft/index`` is JSON (structure and leaves), ``/hpcft/places`` an offset a leaf,
``/hpcft/checksums`` a CRC-32C a leaf.

Everything read is checked before it is used: the checksums against the bytes, places and sizes
against the file, the structure against its grammar. What is wrong raises :class:`Damaged`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcft.ckpt import dtypes
from hpcft.ckpt._engine import crc32c
from hpcft.ckpt.spec import DEEPEST, Node, Spec
from hpcft.errors import HpcftError

VERSION = 1
#: The group of the file that is not the user's.
OWN = "hpcft"
_TEXT = b"hpcft checkpoint; an HDF5 file (user block of 4096 bytes)\n".ljust(64, b"\0")
_HEADER = struct.Struct("<64s3Q9Q")
HEADER_SIZE = _HEADER.size + 8
#: Longer than any that is meant well.
_LONGEST = 1 << 30
_KINDS = {
    "tensor", "ndarray", "none", "bool", "int", "float", "str", "bytes", "bigint",
    "intlist", "inttuple", "floatlist", "floattuple",
}  # fmt: skip


class Damaged(HpcftError):
    """A checkpoint's file is not what was once written, or never was a checkpoint."""


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
    places: Stretch
    checksums: Stretch

    def encode(self) -> bytes:
        """The header's bytes."""
        parts = (self.index, self.places, self.checksums)
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
class Index:
    """The leaves of a file.

    structure: how they make up the tree.
    places: offset of each leaf's bytes.
    checksums: CRC-32C of each leaf's bytes.
    """

    structure: Node
    specs: tuple[Spec, ...]
    places: tuple[int, ...]
    checksums: tuple[int, ...]


def encode(structure: Node, specs: Sequence[Spec]) -> bytes:
    """The JSON that does not change from save to save."""
    leaves = [[s.path, s.kind, s.dtype, list(s.shape)] for s in specs]
    return json.dumps({"structure": structure, "leaves": leaves}, separators=(",", ":")).encode()


def decode(text: bytes, places: bytes, checksums: bytes, size: int) -> Index:
    """The index of a file of ``size`` bytes, from its three parts.

    Raises
    ------
    Damaged: they are not what they should be, or do not fit each other.
    """
    try:
        content = json.loads(text)
        leaves, structure = content["leaves"], content["structure"]
        specs = tuple(_spec(*leaf) for leaf in leaves)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"the index is damaged: {error!r}") from error
    if len(places) != 8 * len(specs) or len(checksums) != 4 * len(specs):
        raise Damaged("the index is damaged: its parts differ in length")
    at = tuple(np.frombuffer(places, "<u8").tolist())
    sums = tuple(np.frombuffer(checksums, "<u4").tolist())
    for spec, place in zip(specs, at, strict=True):
        if place + spec.nbytes > size:
            raise Damaged(f"{spec.path} lies past the end of the file")
    seen: set[int] = set()
    _check(structure, len(specs), seen, 0)
    if len(seen) != len(specs):
        raise Damaged("the index is damaged: leaves belong nowhere")
    return Index(structure, specs, at, sums)


def _spec(path: Any, kind: Any, dtype: Any, shape: Any) -> Spec:
    if not isinstance(path, str) or kind not in _KINDS or not isinstance(shape, list):
        raise ValueError(f"no leaf: {path!r} {kind!r} {shape!r}"[:200])
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape):
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
