"""Who may write to a directory of checkpoints: one run at a time, from whatever node.

In the directory lies a file, ``.lock``. Who writes to the directory keeps it locked by fcntl(2),
which network file systems pass on to other nodes, and has its name in it. The kernel lets go of a
lock when its process ends, however it ends; so the name alone says nothing.

The lock is that of an open file (``F_OFD_SETLK``), and not of a process, which would lose it as
soon as anything in it opens and closes the file, such as a copy of the whole directory. Processes
that are forked off close the file, so that none of them keeps the lock of a parent that has died.

In a run it is rank 0 that has the lock. When that dies another process of the run takes it over,
and has to find it free: so who has been waiting for a lock leaves it for a while when it becomes
free without having been given back.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcft.ckpt.errand import Errand
from hpcft.errors import UsageError

_NAME = ".lock"
#: What fcntl answers if another has the lock.
_HELD = (errno.EACCES, errno.EAGAIN)
#: struct flock: the whole file.
_WHOLE = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
#: Seconds between two tries.
_LOOK = 1.0
#: Seconds for which who waits leaves a lock that was not given back to its owner's successor.
_SUCCESSION = 15.0

#: Descriptors with a lock, which a forked process must not keep.
_locked: set[int] = set()


def _forked() -> None:
    for fd in _locked:
        os.close(fd)
    _locked.clear()


os.register_at_fork(after_in_child=_forked)


class Standing(enum.Enum):
    """How a process stands to a lock.

    OURS: it has it.
    KIN: another process of the same run has it, which is gone, or about to be.
    TAKEN: somebody else has it, or may take it over.
    NONE: there are no locks here.
    """

    OURS = enum.auto()
    KIN = enum.auto()
    TAKEN = enum.auto()
    NONE = enum.auto()


@dataclass(frozen=True)
class Owner:
    """Who has a lock.

    what: for people, such as "the run in /scratch/me/hpcft-runs/7".
    key: the same in all processes of a run, and in no others.
    since: seconds since 1970.
    """

    what: str
    key: str
    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"{self.what} (process {self.pid} on {self.host}, since {since})"

    @classmethod
    def of(cls, content: bytes) -> Owner | None:
        """Who has written this; None if that cannot be told."""
        try:
            found = json.loads(content)
            what, key, host = str(found["what"]), str(found["key"]), str(found["host"])
            return cls(what, key, host, int(found["pid"]), float(found["since"]))
        except (ValueError, TypeError, KeyError):
            return None


class Lock:
    """The lock of a directory, as one process sees it; for all its threads.

    Parameters
    ----------
    directory: which.
    what, key: who this is, as in :class:`Owner`.

    Attributes
    ----------
    other: who has it, as far as is known.
    why: there are no locks.
    """

    def __init__(self, directory: Path, what: str, key: str) -> None:
        self.other: Owner | None = None
        self.why = ""
        self._directory = directory
        self._what, self._key = what, key
        self._mutex = threading.Lock()
        self._fd = -1
        #: Whether somebody else has been seen to have it; since when it is free, not given back.
        self._seen_taken = False
        self._free_since: float | None = None
        self._pursuit: Errand[None] | None = None
        self._released = threading.Event()

    def take(self) -> Standing:
        """Take the lock, if that can be; does not wait, but for the file system."""
        with self._mutex:
            if self._fd >= 0:
                return Standing.OURS
            try:
                fd = self._open()
            except OSError as error:
                # Also where nothing can be written: what follows will tell.
                self.why = str(error)
                return Standing.NONE
            if fd < 0:
                self._free_since = None
                if self.other and self.other.key == self._key:
                    return Standing.KIN
                self._seen_taken = True
                return Standing.TAKEN
            if self._seen_taken and self._may_be_taken_over(fd):
                os.close(fd)
                return Standing.TAKEN
            self._fd = fd
            _locked.add(fd)
            me = Owner(self._what, self._key, socket.gethostname(), os.getpid(), time.time())
            with contextlib.suppress(OSError):  # a full disk: it is ours without a name, too
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(asdict(me)).encode() + b"\n", 0)
            return Standing.OURS

    def _open(self) -> int:
        """A descriptor with the lock; -1 if another has it.

        Raises
        ------
        OSError: there are no locks here.
        """
        while True:
            fd = os.open(self._directory / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self._directory / _NAME)):
                        return fd
                # Given back, and with that removed, in between.
                os.close(fd)
            except OSError as error:
                if error.errno not in _HELD:
                    os.close(fd)
                    raise
                # The name can be half written; then the one before is as good.
                self.other = Owner.of(os.pread(fd, 4096, 0)) or self.other
                os.close(fd)
                return -1

    def _may_be_taken_over(self, fd: int) -> bool:
        """Whether a lock that is free now has not been given back, and not for long."""
        former = Owner.of(os.pread(fd, 4096, 0))
        if former is None or former.key == self._key:
            return False
        if self._free_since is None:
            self._free_since = time.monotonic()
        return time.monotonic() - self._free_since < _SUCCESSION

    def wait(
        self, patience: float, tell: Callable[[str], None], look: Callable[[], object]
    ) -> Standing:
        """Take the lock, once who has it has given it back.

        Parameters
        ----------
        patience: seconds to wait for that.
        tell: told once, and only if it has to be waited for.
        look: called while it is waited for; may raise what ends that.

        Returns
        -------
        How this process stands to it now; never TAKEN.

        Raises
        ------
        UsageError: it is not given back.
        """
        began: float | None = None
        while (standing := Errand(self.take).result()) is Standing.TAKEN:
            if began is None:
                began = time.monotonic()
                tell(f"{self.said}; waiting up to {patience:g} s for it to end")
            if time.monotonic() - began > patience and self._free_since is None:
                raise self.refusal("end that, or give another --ckpt-dir")
            time.sleep(_LOOK)
            look()
        return standing

    def pursue(self, patience: float, tell: Callable[[str], None]) -> None:
        """Take the lock over from a process of this run that has died, in the background.

        The lock of a process whose node is lost can outlive it on a network file system.

        Parameters
        ----------
        patience: seconds after which it is said that it is not free yet.
        """
        if self._pursuit is None or self._pursuit.done:
            self._released.clear()
            self._pursuit = Errand(lambda: self._pursue(patience, tell))

    def _pursue(self, patience: float, tell: Callable[[str], None]) -> None:
        deadline: float | None = time.monotonic() + patience
        while (standing := self.take()) in (Standing.KIN, Standing.TAKEN):
            if deadline and time.monotonic() > deadline:
                deadline = None
                then = " and nothing is saved" if standing is Standing.TAKEN else ""
                tell(f"{self.said}; training goes on{then}, and it is tried again")
            if self._released.wait(_LOOK):
                return

    def release(self) -> None:
        """Give it back."""
        self._released.set()
        with self._mutex:
            if self._fd >= 0:
                with contextlib.suppress(OSError):
                    (self._directory / _NAME).unlink()
                _locked.discard(self._fd)
                os.close(self._fd)
                self._fd = -1

    @property
    def said(self) -> str:
        """Who has it, in words."""
        return f"{self._directory} is in use by {self.other or 'somebody who gives no name'}"

    def refusal(self, remedy: str) -> UsageError:
        """The error of who cannot go on without it."""
        return UsageError(self.said, remedy)


@contextmanager
def locked(directory: Path, what: str) -> Iterator[None]:
    """Have the lock of a directory for a while.

    Parameters
    ----------
    what: has it, for people.

    Raises
    ------
    UsageError: another has it.
    """
    lock = Lock(directory, what, secrets.token_hex(8))
    if lock.take() is Standing.TAKEN:
        raise lock.refusal("wait until that has ended, or name another directory")
    try:
        yield
    finally:
        lock.release()
