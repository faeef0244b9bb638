"""What a checkpoint is worth on data that is held out: ``evaluation.json``, beside its state.

Whoever evaluates a checkpoint has that file locked meanwhile, so that nobody else does. The lock is
that of a process (``lockf``) and goes with it, however it ends; then another takes over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

NAME = "evaluation.json"
#: What such metrics are called where those of the training are told as well.
PREFIX = "validation/"
_HELD = (errno.EACCES, errno.EAGAIN)


def metrics(folder: Path, step: int) -> dict[str, float]:
    """What the checkpoint of ``step`` in ``folder`` was found to be worth; nothing if not yet."""
    try:
        said = json.loads((folder / NAME).read_bytes())
        if said["step"] != step:
            # A folder that was used again.
            return {}
        return {PREFIX + str(name): float(value) for name, value in said["metrics"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


class Claim:
    """A checkpoint that this process alone evaluates."""

    def __init__(self, fd: int, step: int) -> None:
        self._fd = fd
        self._step = step

    def settle(self, found: Mapping[str, float]) -> None:
        """Write down what it is worth.

        Raises
        ------
        OSError: it cannot be.
        """
        finite = {name: value for name, value in found.items() if math.isfinite(value)}
        text = json.dumps({"step": self._step, "metrics": finite}).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)


@contextmanager
def claimed(folder: Path, step: int) -> Iterator[Claim | None]:
    """Evaluate a checkpoint, unless another does so, or has.

    Raises
    ------
    OSError: the checkpoint is gone, or cannot be written to.
    """
    fd = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield Claim(fd, step) if _ours(fd) and not os.fstat(fd).st_size else None
    finally:
        os.close(fd)


def _ours(fd: int) -> bool:
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Where there are no locks it is done several times rather than not at all.
        return error.errno not in _HELD
    return True
