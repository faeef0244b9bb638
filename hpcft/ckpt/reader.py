"""Looking into a checkpoint's file without its library: what is in it, and whether it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.ckpt._engine import Engine, Transfer, crc32c
from hpcft.ckpt.files import OpenFile
from hpcft.ckpt.index import HEADER_SIZE, OWN, Damaged, Header, Index, Stretch, decode


@dataclass(frozen=True)
class Opened:
    """A checkpoint's file whose index has been read and checked."""

    file: OpenFile
    step: int
    index: Index


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Open a checkpoint's file.

    Raises
    ------
    Damaged: it is not whole; says what is wrong.
    OSError: it cannot be read.
    """
    try:
        with OpenFile.for_reading(path) as file:
            header = Header.decode(file.read(0, HEADER_SIZE), file.size)
            text = _checked(file, header.index)
            places, checksums = _checked(file, header.places), _checked(file, header.checksums)
            content = decode(text, places, checksums, file.size)
            yield Opened(file, header.step, content)
    except Damaged as error:
        # Also what is found while it is open.
        raise Damaged(f"{path}: {error.message}", error.remedy) from error


def _checked(file: OpenFile, part: Stretch) -> bytes:
    content = file.read(part.offset, part.length)
    if crc32c(content) != part.checksum:
        raise Damaged("the index is damaged")
    return content


def read(
    checkpoint: Opened,
    engine: Engine,
    memory: Callable[[int], Any],
    watch: Callable[[Transfer], object] = Transfer.wait,
) -> list[str]:
    """Read all leaves and check them.

    Parameters
    ----------
    memory: where a leaf's bytes go, by its number; None reads them for their checksum only.
    watch: waits for the transfer.

    Returns
    -------
    The paths of those that are not as they were written.

    Raises
    ------
    Damaged: the file is too short, or leaves lie on each other.
    OSError: it cannot be read.
    """
    content = checkpoint.index
    wanted = sorted(
        (i for i in leaves(content) if content.specs[i].nbytes), key=lambda i: content.places[i]
    )
    _without_overlap([(content.places[i], content.specs[i].nbytes) for i in wanted])
    extents = [(memory(i), 0, content.places[i], content.specs[i].nbytes) for i in wanted]
    transfer = engine.read([checkpoint.file.for_engine], extents)
    try:
        watch(transfer)
    except EOFError as error:
        raise Damaged("the file ends too early") from error
    return [
        content.specs[i].path
        for i, found in zip(wanted, transfer.checksums(), strict=True)
        if found != content.checksums[i]
    ]


def leaves(content: Index) -> list[int]:
    """The numbers of the user's leaves; the others describe them, and have been read already."""
    return [i for i, s in enumerate(content.specs) if not s.path.startswith(f"/{OWN}/")]


def _without_overlap(stretches: list[tuple[int, int]]) -> None:
    """See that stretches (place, length), in order, do not lie on each other.

    Otherwise a small file could ask for any amount of memory.
    """
    end = 0
    for place, length in stretches:
        if place < end:
            raise Damaged("the index is damaged: leaves lie on each other")
        end = place + length
