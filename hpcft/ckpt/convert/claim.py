"""What a killed export or import has left, told from what another is writing.

Beside what is being written lies a file that its writer keeps locked; the kernel lets go of the
lock when the process ends, however it ends. Not every network file system passes locks on to other
nodes, so the file says under which kernel its writer runs, and only there it is believed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"


@contextmanager
def claimed(folder: Path, prefix: str) -> Iterator[Path]:
    """A new path to write to, which is not taken for abandoned while this is open.

    Parameters
    ----------
    prefix: of its name, by which :func:`abandoned` finds it.

    Raises
    ------
    OSError: nothing can be written there.
    """
    path = folder / f"{prefix}{secrets.token_hex(4)}"
    lock = path.with_name(path.name + _LOCK)
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        # Where there are no locks the file stays empty, and says nothing to anybody.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Only now, for what is said counts as soon as nobody has the lock.
            os.write(fd, _kernel())
        yield path
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(fd)


def abandoned(folder: Path, prefix: str) -> Iterator[Path]:
    """The paths whose writers have been killed; each counts as dealt with after it was given.

    Raises
    ------
    OSError: the folder cannot be read.
    """
    name = re.compile(re.escape(prefix) + "[0-9a-f]{8}" + re.escape(_LOCK))
    for lock in sorted(entry for entry in folder.iterdir() if name.fullmatch(entry.name)):
        with suppress(OSError):
            fd = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.read(fd, 100) == _kernel():
                    yield lock.with_name(lock.name.removesuffix(_LOCK))
                    lock.unlink()
            finally:
                os.close(fd)


def _kernel() -> bytes:
    """Which machine this is, since it was started."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes()
