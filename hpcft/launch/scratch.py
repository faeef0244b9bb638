"""A directory on this node for what Open MPI keeps while it runs, gone when it has ended.

Left to itself Open MPI puts that under names made of process ids. A process that is killed leaves
it behind: shared memory nobody uses, and session directories over which a later mpiexec that
happens to get the same process id fails ("listener thread failed to start").
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "hpcft-scratch-"
_LOCK = "lock"


@contextmanager
def scratch(base: Path | None = None) -> Iterator[Path]:
    """Make a directory, and remove it afterwards; also those whose makers were killed.

    Parameters
    ----------
    base: where; default: in memory if that can be, else among the temporary files.
    """
    base = base or _base()
    _sweep(base)
    made = Path(tempfile.mkdtemp(prefix=".hpcft-", dir=base))
    # Held as long as this process lives, and before others look for what is not.
    lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = made.rename(base / f"{_PREFIX}{made.name.removeprefix('.hpcft-')}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _base() -> Path:
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _sweep(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*"):
        # Those of other users cannot be opened.
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
