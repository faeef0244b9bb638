"""How far a rank is, in a page of memory it shares with its shepherd.

Writing costs the rank a microsecond and no system call; the shepherd reads it now and then to tell
a rank that is stuck from one that computes.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What the page said at one moment.

    running: inside ``job.run``, where steps are expected to advance.
    step: steps completed.
    calls: blocking calls entered and left so far.
    waiting: inside a blocking call, that is, waiting for another rank.
    """

    running: bool
    step: int
    calls: int
    waiting: bool


_LAYOUT = struct.Struct("=QQQ")


class Progress:
    """The shared page; the rank writes, its shepherd reads.

    Parameters
    ----------
    fd: a file of at least a page; :meth:`create` makes one.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)
        self._running = 0
        self._step = 0
        self._calls = 0
        self._depth = 0

    @classmethod
    def create(cls) -> Progress:
        """A new page, in memory only."""
        fd = os.memfd_create("hpcft-progress")
        os.ftruncate(fd, mmap.PAGESIZE)
        return cls(fd)

    def _write(self) -> None:
        _LAYOUT.pack_into(self._page, 0, self._running, self._step, self._calls)

    def run(self, running: bool) -> None:
        """Steps are expected to advance from now on, or no longer."""
        self._running = int(running)
        self._write()

    def step(self, step: int) -> None:
        """``step`` steps are completed."""
        self._step = step
        self._write()

    def enter(self) -> None:
        """A call that may wait for another rank begins. Calls may nest."""
        self._depth += 1
        if self._depth == 1:
            self._calls += 1
            self._write()

    def leave(self) -> None:
        """It is over."""
        self._depth -= 1
        if self._depth == 0:
            self._calls += 1
            self._write()

    def read(self) -> Reading:
        """What the rank wrote last."""
        running, step, calls = _LAYOUT.unpack_from(self._page, 0)
        # Counted once when entered and once when left, so an odd count is inside.
        return Reading(bool(running), step, calls, bool(calls % 2))
