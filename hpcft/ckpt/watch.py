"""What happens in a directory of checkpoints, seen from outside.

Only what the file system tells is used, so that it works while a job on another node writes, and
disturbs nobody:

* a directory aside whose last change of name is later than that of its content is an earlier
  checkpoint's, used again. All blocks of its files are there from the start, so
  how far the writing is cannot be seen, only when the last write was;
* in any other the files are new: sparse, of their final size from the start, and their blocks are
  what has been written.

Where each rank writes a file of its own, the sums over the files are told.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.ckpt.store import STATE, Checkpoint, Store, files

#: Seconds of writing from which a rate can be told.
_MEASURABLE = 0.5


@dataclass(frozen=True)
class Committed:
    """A checkpoint that is there.

    bytes: size of its files; None if there are none.
    saved: time of its last write; seconds since 1970.
    """

    step: int
    name: str
    bytes: int | None
    saved: float


@dataclass(frozen=True)
class Aside:
    """Files being written, or waiting to be.

    bytes: size it will have.
    written: bytes of it that are on the disk; None in one that is used again, where it cannot be
        told.
    begun: when the writing began, or, of one that waits, when it came to lie there.
    last_write: when something was written to it; None if nothing was since it has lain there.
    """

    name: str
    bytes: int
    written: int | None
    begun: float
    last_write: float | None

    @property
    def rate(self) -> float | None:
        """Bytes a second since it began, by the file system's clock; None if it cannot be told."""
        seconds = (self.last_write or self.begun) - self.begun
        if not self.written or seconds < _MEASURABLE:
            return None
        return self.written / seconds

    @property
    def left(self) -> float | None:
        """Seconds it will take at that rate; None if it cannot be told."""
        rate = self.rate
        return None if rate is None or self.written is None else (self.bytes - self.written) / rate


@dataclass(frozen=True)
class View:
    """A directory at a moment.

    time: seconds since 1970.
    free: bytes of the file system that a user may still take.
    total: bytes it has.
    """

    time: float
    free: int
    total: int
    committed: tuple[Committed, ...]
    aside: tuple[Aside, ...]


def look(store: Store) -> View:
    """See what is there.

    Raises
    ------
    OSError: the directory cannot be read.
    """
    disk = shutil.disk_usage(store.path)
    return View(
        time.time(),
        disk.free,
        disk.total,
        tuple(found for c in store.committed() for found in _committed(c)),
        tuple(found for path in store.aside() + store.drains() for found in _aside(path)),
    )


# What is renamed or removed between two looks is left out.


def _committed(checkpoint: Checkpoint) -> Iterator[Committed]:
    name = checkpoint.path.name
    try:
        found = _about(checkpoint.path)
        saved = max(about.st_mtime for about in found)
        yield Committed(checkpoint.step, name, sum(about.st_size for about in found), saved)
    except (FileNotFoundError, NotADirectoryError):
        try:
            yield Committed(checkpoint.step, name, None, checkpoint.path.stat().st_mtime)
        except FileNotFoundError:
            return


def _aside(path: Path) -> Iterator[Aside]:
    try:
        directory, found = path.stat(), _about(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    again = directory.st_ctime_ns > directory.st_mtime_ns
    size = sum(about.st_size for about in found)
    blocks = sum(min(about.st_blocks * 512, about.st_size) for about in found)
    last = max(found, key=lambda about: about.st_mtime_ns)
    touched = not again or last.st_mtime_ns > directory.st_ctime_ns
    yield Aside(
        path.name,
        size,
        None if again else blocks,
        directory.st_ctime,
        last.st_mtime if touched else None,
    )


def _about(path: Path) -> list[os.stat_result]:
    """What is known of the files of a checkpoint, that with the index first."""
    others = [file for file in files(path) if file.name != STATE]
    return [file.stat() for file in (path / STATE, *others)]
