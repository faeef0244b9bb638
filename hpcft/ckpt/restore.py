"""Reading a checkpoint back: everything is checked before it is believed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.ckpt import index, tree
from hpcft.ckpt._engine import Engine, crc32c
from hpcft.ckpt.files import OpenFile
from hpcft.ckpt.index import HEADER_SIZE, Damaged, Header, Index, Stretch
from hpcft.ckpt.save import OWN


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
    with OpenFile.for_reading(path) as file:
        header = Header.decode(file.read(0, HEADER_SIZE), file.size)
        text = _checked(file, header.index)
        places, checksums = _checked(file, header.places), _checked(file, header.checksums)
        content = index.decode(text, places, checksums, file.size)
        yield Opened(file, header.step, content)


def _checked(file: OpenFile, part: Stretch) -> bytes:
    content = file.read(part.offset, part.length)
    if crc32c(content) != part.checksum:
        raise Damaged("the index is damaged")
    return content


def load(path: Path, engine: Engine) -> tuple[int, dict[str, Any]]:
    """Read a whole checkpoint.

    Returns
    -------
    (step, tree): steps completed, and the state.

    Raises
    ------
    Damaged: something in it is not as it was written; names the leaves.
    OSError: it cannot be read.
    """
    try:
        with opened(path) as checkpoint:
            return checkpoint.step, _read(checkpoint, engine)
    except Damaged as error:
        raise Damaged(f"{path}: {error.message}", error.remedy) from error


def _read(checkpoint: Opened, engine: Engine) -> dict[str, Any]:
    content = checkpoint.index
    own = _own(content)
    wanted = sorted(
        (i for i, spec in enumerate(content.specs) if spec.nbytes and i not in own),
        key=lambda i: content.places[i],
    )
    _without_overlap([(content.places[i], content.specs[i].nbytes) for i in wanted])
    try:
        blanks = [tree.blank(spec) for spec in content.specs]
    except (ValueError, RuntimeError, MemoryError) as error:
        raise Damaged(f"the index is damaged, or memory too small: {error}") from error
    extents = [(blanks[i][1], 0, content.places[i], content.specs[i].nbytes) for i in wanted]
    transfer = engine.read([checkpoint.file.for_engine], extents)
    try:
        transfer.wait()
    except EOFError as error:
        raise Damaged("the file ends too early") from error
    bad = [
        content.specs[i].path
        for i, found in zip(wanted, transfer.checksums(), strict=True)
        if found != content.checksums[i]
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise Damaged(f"damaged are {', '.join(bad[:3])}{more}", "restore another checkpoint")
    try:
        values = [tree.value(spec, b[0]) for spec, b in zip(content.specs, blanks, strict=True)]
    except ValueError as error:
        raise Damaged(f"a value is none: {error}") from error
    whole = tree.unflatten(content.structure, values)
    if not isinstance(whole, dict):
        raise Damaged("the index is damaged: no state")
    whole.pop(OWN, None)
    return whole


def _own(content: Index) -> set[int]:
    """The leaves that describe the others, which have been read already."""
    return {i for i, spec in enumerate(content.specs) if spec.path.startswith(f"/{OWN}/")}


def _without_overlap(stretches: list[tuple[int, int]]) -> None:
    """See that stretches (place, length), in order, do not lie on each other.

    Otherwise a small file could ask for any amount of memory.
    """
    end = 0
    for place, length in stretches:
        if place < end:
            raise Damaged("the index is damaged: leaves lie on each other")
        end = place + length
