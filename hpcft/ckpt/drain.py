"""Making a checkpoint in the directory of one near the ranks, by a process that is no rank.

The files of the one near the ranks have been gathered on this process's node, under other names or
as copies (:mod:`hpcft.launch.courier`), in a folder that is a checkpoint with a file per rank, as
:mod:`hpcft.ckpt.near` says. They are mapped, and the engine writes from there, through its pool;
nothing else of the state is in this process's memory. The engine's checksums of what it has written
have to be those that are in the index, as in a restore. What is written then lies aside, and on the
disk, for rank 0 to commit (:mod:`hpcft.ckpt.store`).
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hpcft.ckpt import reader
from hpcft.ckpt.index import OWN, Damaged, Index
from hpcft.ckpt.near import NearStore
from hpcft.ckpt.plan import Part, Summed
from hpcft.ckpt.ranks import Memory
from hpcft.ckpt.reader import Opened, opened
from hpcft.ckpt.save import Save, Saver
from hpcft.ckpt.spec import Node
from hpcft.ckpt.store import STATE, Checkpoint, Store, read_metrics

#: Seconds between two looks at how far the writing is.
_LOOK = 0.02


class DrainShelf:
    """Where a spare writes checkpoints; they are committed by rank 0.

    Parameters
    ----------
    store: the directory.
    """

    def __init__(self, store: Store) -> None:
        self.path = store.path
        self._store = store

    def begin(self, step: int) -> Path:
        """A directory that is no rank's."""
        return self._store.begin_drain()

    def join(self, folder: Path, own: str | None) -> None:
        """There is nobody else."""

    def commit(
        self, folder: Path, step: int, metrics: Mapping[str, float] | None = None
    ) -> Checkpoint:
        """All but the commit."""
        self._store.complete(folder, metrics)
        return Checkpoint(step, 1, folder)


def newest(store: NearStore) -> Path | None:
    """The folder of the newest checkpoint of which all files have been gathered."""
    return next(filter(_is_whole, reversed(store.gathered())), None)


def _is_whole(folder: Path) -> bool:
    try:
        with opened(folder / STATE, others=False) as found:
            return all((folder / file.name).exists() for file in found.index.files[1:])
    except FileNotFoundError:
        return False
    except (Damaged, OSError):
        # It will not become better, and :func:`drain` says what is wrong with it.
        return True


def drain(folder: Path, saver: Saver) -> Save:
    """Write what has been gathered in a folder.

    Parameters
    ----------
    saver: its store is a :class:`DrainShelf`.

    Returns
    -------
    The save that is complete but for the commit.

    Raises
    ------
    Damaged: it is not as it was written.
    SaveFailed, OSError: it cannot be read, or written.
    """
    with opened(folder / STATE) as source:
        index = source.index
        leaves, structure = _users(index)

        def check(summed: Sequence[Summed]) -> None:
            bad = reader.damage(index, summed, leaves)
            if bad.leaves:
                raise Damaged(f"damaged are {reader.told(index, bad)}", files=bad.files)

        save = saver.begin_copy(
            source.step,
            structure,
            index.specs[: len(leaves)],
            _pieces(source, leaves),
            read_metrics(folder),
            check,
        )
        while not save.advance(waiting=True):
            time.sleep(_LOOK)
        save.finish()
        return save


def _users(index: Index) -> tuple[list[int], Node]:
    """The leaves of the state, and how they make it up, without those that describe them.

    Raises
    ------
    Damaged: the index is not as it is written.
    """
    leaves = reader.leaves(index)
    if leaves != list(range(len(leaves))) or not isinstance(index.structure, list):
        raise Damaged("the index is damaged: leaves are not in order")
    kind, items = index.structure
    return leaves, [kind, [item for item in items if item[0] != OWN]]


def _pieces(source: Opened, leaves: Sequence[int]) -> list[tuple[Part, Memory]]:
    """The bytes of the leaves, where they are in the files."""
    files = [np.frombuffer(source.file.read(0, source.file.size), np.uint8)]
    files += [_mapped(source.locate(file.name), file.size) for file in source.index.files[1:]]
    return [
        (
            Part(leaf, piece.begin, piece.begin + piece.length),
            files[piece.file][piece.offset : piece.offset + piece.length],
        )
        for leaf in leaves
        for piece in source.index.pieces(leaf)
    ]


def _mapped(path: Path, size: int) -> Memory:
    if not size:
        return np.empty(0, np.uint8)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
