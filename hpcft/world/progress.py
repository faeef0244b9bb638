"""How far a rank is, in a page of memory it shares with its shepherd.

Writing costs the rank a microsecond and no system call; the shepherd reads it now and then to tell
a rank that is stuck from one that computes.

The page also holds a robust mutex that the rank keeps locked for life. When a process is killed the
kernel first passes on its robust mutexes (get_robust_list(2)), then takes its memory apart, and
only then tells its parent. With much memory that takes long, so whoever waits for the mutex knows
of the death a tenth of a second earlier.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What the page said at one moment.

    running: inside ``job.run``, where steps are expected to advance.
    step: steps completed.
    calls: blocking calls entered and left so far.
    waiting: inside a blocking call, that is, waiting for another rank.
    mending: in a part of a recovery that takes milliseconds, once all have come to it.
    """

    running: bool
    step: int
    calls: int
    waiting: bool
    mending: bool = False

    @classmethod
    def of(cls, page: bytes | mmap.mmap) -> Reading:
        """What a page says."""
        running, step, calls, mending = _LAYOUT.unpack_from(page, 0)
        # Counted once when entered and once when left, so an odd count is inside.
        return cls(bool(running), step, calls, bool(calls % 2), bool(mending))


_LAYOUT = struct.Struct("=QQQQ")
_NAME = "hpcft-progress"
#: Where the page says which process has made it: the shepherd.
_SHEPHERD, _PID = 64, struct.Struct("=Q")
#: Where the mutex is in the page; far more than any libc's takes is left for it.
_MUTEX, _MUTEX_SIZE = 128, 128
_PTHREAD_PROCESS_SHARED = _PTHREAD_MUTEX_ROBUST = 1


class Progress:
    """The shared page; the rank writes, its shepherd reads.

    Parameters
    ----------
    fd: a file of at least a page; :meth:`create` makes one.

    Attributes
    ----------
    waited: seconds that this process has spent in calls that may wait for another rank.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._page = mmap.mmap(fd, mmap.PAGESIZE)
        self._mutex = (ctypes.c_char * _MUTEX_SIZE).from_buffer(self._page, _MUTEX)
        self._libc = ctypes.CDLL(None)
        self._running = 0
        self._step = 0
        self._calls = 0
        self._depth = 0
        self.waited = 0.0
        self._entered = 0.0
        self._mending = 0

    @classmethod
    def create(cls) -> Progress:
        """A new page, in memory only."""
        fd = os.memfd_create(_NAME)
        os.ftruncate(fd, mmap.PAGESIZE)
        page = cls(fd)
        _PID.pack_into(page._page, _SHEPHERD, os.getpid())
        attributes = ctypes.create_string_buffer(_MUTEX_SIZE)
        libc = page._libc
        libc.pthread_mutexattr_init(attributes)
        libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED)
        libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST)
        libc.pthread_mutex_init(page._mutex, attributes)
        return page

    def live(self) -> None:
        """Lock the mutex for as long as the calling thread lives: the rank's main thread."""
        self._libc.pthread_mutex_lock(self._mutex)

    def wait_for_end(self) -> None:
        """Block until the thread that called :meth:`live` is gone; return at once if none has."""
        self._libc.pthread_mutex_lock(self._mutex)

    def _write(self) -> None:
        _LAYOUT.pack_into(self._page, 0, self._running, self._step, self._calls, self._mending)

    def run(self, running: bool) -> None:
        """Steps are expected to advance from now on, or no longer."""
        self._running = int(running)
        self._write()

    def step(self, step: int) -> None:
        """``step`` steps are completed."""
        self._step = step
        self._write()

    @property
    def completed(self) -> int:
        """How many steps this process has said are completed."""
        return self._step

    def enter(self) -> None:
        """A call that may wait for another rank begins. Calls may nest."""
        self._depth += 1
        if self._depth == 1:
            self._entered = time.monotonic()
            self._calls += 1
            self._write()

    def leave(self) -> None:
        """It is over."""
        self._depth -= 1
        if self._depth == 0:
            self.waited += time.monotonic() - self._entered
            self._calls += 1
            self._write()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a call that may wait for another rank."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextlib.contextmanager
    def mending(self, mending: bool = True) -> Iterator[None]:
        """Around a part of a recovery; with False around what takes its time within that."""
        before, self._mending = self._mending, int(mending)
        self._write()
        try:
            yield
        finally:
            self._mending = before
            self._write()

    def read(self) -> Reading:
        """What the rank wrote last."""
        return Reading.of(self._page)


def peek(pid: int) -> Reading | None:
    """What rank ``pid`` of this machine wrote last, for whoever may look into the process.

    Returns
    -------
    None if it is no rank, not this user's, or gone.
    """
    page = _page_of(pid)
    return Reading.of(page) if page else None


def shepherd_of(pid: int) -> int | None:
    """The process that looks after rank ``pid``, which need not be its parent; None as above."""
    page = _page_of(pid)
    return int(_PID.unpack_from(page, _SHEPHERD)[0]) if page else None


def _page_of(pid: int) -> bytes:
    """What is in the page before the mutex; empty if there is none to be seen."""
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            if os.readlink(entry.path).startswith(f"/memfd:{_NAME} "):
                with open(entry.path, "rb") as page:
                    return page.read(_MUTEX)
    except OSError:
        pass
    return b""
