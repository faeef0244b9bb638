"""Signals that are meant for the shepherds."""

from __future__ import annotations

import os
import signal
from types import FrameType


def leave_to_the_shepherd() -> None:
    """Do not end by signals that Slurm sends to all processes of a job; the shepherds act on them.

    A script may handle them itself.
    """
    # For what it starts, too, such as the workers of a DataLoader.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stay)
    signal.siginterrupt(signal.SIGTERM, False)


def _stay(number: int, frame: FrameType | None) -> None:
    """Not ignored, for then what this process starts would ignore it, too."""


def _end_as_usual() -> None:
    """Have a fork end by SIGTERM, whatever it waits for: multiprocessing ends its workers so."""
    if signal.getsignal(signal.SIGTERM) is _stay:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_end_as_usual)
