"""Looking into a checkpoint's files without a library: what is in them, and whether all are whole.

The file with the index is open all the time, the others, of which there may be thousands, only
while something in them is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpcft.ckpt._engine import Transfer, crc32c
from hpcft.ckpt.files import OpenFile
from hpcft.ckpt.index import HEADER_SIZE, OWN, Damaged, File, Header, Index, Stretch, decode
from hpcft.ckpt.plan import Part, Summed, combine, joined

#: From a leaf, a beginning and a length to a leaf, a beginning and an end.
_SPAN = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]])
#: What the engine says of a file, behind its path.
_EARLY = " ends too early"
#: So many files are open at the same time, by four descriptors each; 1024 are usual.
_AT_ONCE = 64


Locate = Callable[[str], Path]


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose index has been read and checked.

    file: the one with the index.
    locate: where another file of it is, by its name.
    """

    file: OpenFile
    step: int
    index: Index
    locate: Locate


@contextmanager
def opened(path: Path, others: bool = True, locate: Locate | None = None) -> Iterator[Opened]:
    """Open a checkpoint's file.

    Parameters
    ----------
    others: see that its other files are there, too. Of ranks that work together one is enough.
    locate: where they are; default: beside it.

    Raises
    ------
    Damaged: it is not whole; says what is wrong.
    OSError: it cannot be read.
    """
    try:
        with OpenFile.for_reading(path) as file:
            header = Header.decode(file.read(0, HEADER_SIZE), file.size)
            text = _checked(file, header.index)
            pieces, checksums = _checked(file, header.pieces), _checked(file, header.checksums)
            content = decode(text, pieces, checksums, File(path.name, file.size))
            found = Opened(file, header.step, content, locate or path.with_name)
            for number in range(1, len(content.files) if others else 0):
                _check_file(found, number)
            yield found
    except Damaged as error:
        # Also what is found while it is open.
        raise Damaged(f"{path}: {error.message}", error.remedy, error.files) from error


def _checked(file: OpenFile, part: Stretch) -> bytes:
    content = file.read(part.offset, part.length)
    if crc32c(content) != part.checksum:
        raise Damaged("the index is damaged")
    return content


def _check_file(checkpoint: Opened, number: int) -> Path:
    """Where one of the other files is, after a look that it is there, in its size."""
    content = checkpoint.index
    name, wanted = content.files[number].name, content.files[number].size
    path = checkpoint.locate(name)
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        what = "is missing"
    else:
        if found == wanted:
            return path
        what = f"has {found} bytes and should have {wanted}"
    raise _no_good(content, number, what)


def _no_good(content: Index, number: int, what: str) -> Damaged:
    """The error of a file that has not been read."""
    name, lost = content.files[number].name, few(content.leaves_in(number))
    said = f"{name} {what}; in it are parts of {lost}"
    return Damaged(said, "restore another checkpoint", [name])


def told(content: Index, bad: Damage) -> str:
    """Damaged leaves in words; with the files they lie in, where there are several."""
    said = few(bad.leaves)
    return f"{said}, in {few(bad.files)}" if len(content.files) > 1 and bad.files else said


def few(paths: Sequence[str]) -> str:
    """Some names, in words."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def read(
    checkpoint: Opened,
    engine: Reads,
    memory: Callable[[int], Any],
    watch: Callable[[Transfer], object] = Transfer.wait,
) -> Damage:
    """Read all leaves and check them.

    Parameters
    ----------
    memory: where a leaf's bytes go, by its number; None reads them for their checksum only.
    watch: waits for a transfer, of which there may be several.

    Returns
    -------
    What is not as it was written.

    Raises
    ------
    Damaged: as :func:`read_parts`.
    """
    content = checkpoint.index
    whole = [(Part(i, 0, content.specs[i].nbytes), memory(i)) for i in leaves(content)]
    return damage(content, read_parts(checkpoint, engine, whole, watch))


class Reads(Protocol):
    """Who reads: an engine, or what knows more kinds of memory."""

    def read(
        self, files: Sequence[tuple[str, int, int]], extents: Sequence[tuple[Any, int, int, int]]
    ) -> Transfer:
        """As :meth:`hpcft.ckpt._engine.Engine.read`."""


def read_parts(
    checkpoint: Opened,
    engine: Reads,
    parts: Iterable[tuple[Part, Any]],
    watch: Callable[[Transfer], object] = Transfer.wait,
) -> list[Summed]:
    """Read parts of leaves; :func:`damage` checks them when all parts have been read.

    Parameters
    ----------
    parts: what to read, and where it goes; None reads it for its checksum only.
    watch: waits for a transfer, of which there may be several.

    Returns
    -------
    Of each part what lies together in a file, with its checksum.

    Raises
    ------
    Damaged: a file is too short, missing, or cannot be read; names it.
    """
    wanted: dict[int, list[_Wanted]] = {}
    for part, memory in parts:
        for piece in checkpoint.index.pieces(part.leaf, part.begin, part.end):
            begin, end = piece.begin, piece.begin + piece.length
            into = None if memory is None else memory[begin - part.begin : end - part.begin]
            one = piece.offset, Part(part.leaf, begin, end), into
            wanted.setdefault(piece.file, []).append(one)
    summed = []
    numbers = sorted(wanted)
    for first in range(0, len(numbers), _AT_ONCE):
        some = {number: wanted[number] for number in numbers[first : first + _AT_ONCE]}
        summed += _read_files(checkpoint, engine, some, watch)
    return summed


#: Offset in a file, what is there, and where it goes.
_Wanted = tuple[int, Part, Any]


def _read_files(
    checkpoint: Opened,
    engine: Reads,
    wanted: Mapping[int, list[_Wanted]],
    watch: Callable[[Transfer], object],
) -> list[Summed]:
    content = checkpoint.index
    with ExitStack() as stack:
        files: list[tuple[str, int, int]] = []
        extents, parts = [], []
        numbers: dict[str, int] = {}
        for number, ones in wanted.items():
            file = checkpoint.file
            if number:
                try:
                    path = _check_file(checkpoint, number)
                    file = stack.enter_context(OpenFile.for_reading(path))
                except OSError as error:
                    raise _no_good(content, number, _unreadable(error)) from error
            numbers[str(file.path)] = number
            for offset, part, memory in sorted(ones, key=lambda one: one[0]):
                extents.append((memory, len(files), offset, part.end - part.begin))
                parts.append(part)
            files.append(file.for_engine)
        transfer = engine.read(files, extents)
        try:
            watch(transfer)
        except EOFError as error:
            path = Path(str(error).removesuffix(_EARLY))
            raise _no_good(content, numbers[str(path)], _EARLY.strip()) from error
        except OSError as error:
            if error.filename not in numbers:
                raise
            raise _no_good(content, numbers[error.filename], _unreadable(error)) from error
        sums = transfer.checksums()
    return [Summed(part, found) for part, found in zip(parts, sums, strict=True)]


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror}"


@dataclass(frozen=True)
class Damage:
    """What is not as it was written.

    leaves: paths.
    files: names of the files it lies in.
    """

    leaves: list[str]
    files: list[str]


def damage(content: Index, summed: Iterable[Summed], read: Sequence[int] | None = None) -> Damage:
    """What is wrong, from the checksums of all parts of the leaves that were read.

    Parameters
    ----------
    read: their numbers; None: all the user's.
    """
    summed, user = list(summed), leaves(content) if read is None else read
    sums = combine(content.specs, summed)
    bad = {i for i in user if sums[i] != content.checksums[i]}
    rows = np.flatnonzero(np.isin(content.table[:, 0], user))
    spans = [Part(*row) for row in (content.table[rows, :3] @ _SPAN).tolist()]
    files = set()
    for row, found in zip(rows.tolist(), joined(spans, summed), strict=True):
        if found != content.piece_checksums[row]:
            bad.add(int(content.table[row, 0]))
            files.add(content.files[content.table[row, 3]].name)
    return Damage([content.specs[i].path for i in sorted(bad)], sorted(files))


def leaves(content: Index) -> list[int]:
    """The numbers of the user's leaves; the others describe them, and have been read already."""
    return [i for i, s in enumerate(content.specs) if not s.path.startswith(f"/{OWN}/")]
