"""The rank's process, seen from its shepherd."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

from hpcft.launch.cause import Ending, ending, oom_kills

_PR_SET_CHILD_SUBREAPER = 36
#: The kernel's PF_EXITING, among a thread's flags.
_EXITING = 0x4


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, so that none gets away."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(root: int) -> list[int]:
    """Process numbers of all running descendants of ``root``, children before grandchildren."""
    families = _families()
    found = list(families.get(root, []))
    for pid in found:
        found.extend(families.get(pid, []))
    return found


def children(parent: int) -> list[int]:
    """Process numbers of the children of ``parent``."""
    return _families().get(parent, [])


def exit_status(pid: int) -> int | None:
    """What ``waitpid`` will say of a process that has ended and that its parent has not taken in.

    Returns
    -------
    The status; None for a process that is running, or gone.
    """
    with contextlib.suppress(OSError):
        fields = _stat(pid)
        if fields[0] == "Z":
            return int(fields[49])
    return None


def _families() -> dict[int, list[int]]:
    """The children of every process that has some."""
    families: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                parent = int(_stat(int(entry))[1])
                families.setdefault(parent, []).append(int(entry))
    return families


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which, in brackets, may hold anything."""
    return _fields(Path(f"/proc/{pid}"))


def _waits(fields: list[str]) -> bool:
    """Whether a thread waits in the kernel, for what no signal ends."""
    state, flags = fields[0], int(fields[6])
    # That one could be woken says nothing once it is ending: with FUSE it closes its files so.
    return state == "D" or (state == "S" and bool(flags & _EXITING))


def _fields(folder: Path) -> list[str]:
    return (folder / "stat").read_text().rpartition(")")[2].split()


class Child:
    """The rank's process.

    Parameters
    ----------
    pid: its number; None until it has been forked.
    """

    def __init__(self, pid: int | None = None) -> None:
        self.pid = pid
        self._oom = oom_kills()
        #: Whether the rank has said that it ends, and what about it.
        self.said_so = False
        self.said = ""
        self.stopped_by_us = False

    def end(self, status: int) -> Ending:
        """What ``waitpid``'s status means."""
        return ending(status, oom_kills() > self._oom, self.said)

    def send(self, number: int) -> None:
        """Send a signal to the rank alone."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the rank and all processes it has started."""
        for pid in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def hold(self, stop: bool) -> None:
        """Stop the rank, or let it go on."""
        self.stopped_by_us = stop
        self.send(signal.SIGSTOP if stop else signal.SIGCONT)

    def hangs(self) -> bool:
        """Whether the kernel keeps one of its threads waiting for a device or a file system."""
        with contextlib.suppress(OSError):
            return any(map(_waits, map(_fields, Path(f"/proc/{self.pid}/task").iterdir())))
        return False

    def cpu_seconds(self) -> float:
        """Processor time the rank and its descendants have used so far."""
        ticks = 0
        for pid in self.family():
            with contextlib.suppress(OSError):
                fields = _stat(pid)
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def family(self) -> list[int]:
        """The rank and all processes it has started."""
        return [] if self.pid is None else [self.pid, *descendants(self.pid)]
