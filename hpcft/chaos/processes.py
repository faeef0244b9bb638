"""Faults of processes: killed, hanging, slow, and a neighbour that takes their memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from hpcft.chaos.faults import Fault, Refused, Task
from hpcft.world.progress import peek, shepherd_of

#: A slow rank is stopped for so long at a time. Shepherds take a stop for a hang at 3/4 of
#: --timeout-detect, which is 0.1 s at the least.
_STOPPED = 0.05
#: Of the memory that is free, so much is left to others without --yes.
_RESERVE = 0.2
#: What takes memory does so in pieces.
_PIECE = 64 << 20
_CGROUPS = Path("/sys/fs/cgroup")


def _stat(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError as error:
        raise Refused(f"process {pid} is gone") from error
    # Behind the name, which may have blanks in it.
    return text.rpartition(")")[2].split()


def born(pid: int) -> int:
    """When a process was: with its number that names it for good.

    Raises
    ------
    Refused: it is gone.
    """
    return int(_stat(pid)[19])


def send(pid: int, since: int, number: int) -> bool:
    """Send a signal to a process, if it is still the one that was meant; whether it is."""
    try:
        if born(pid) != since:
            return False
        os.kill(pid, number)
    except (Refused, ProcessLookupError):
        return False
    return True


def rank(task: Task) -> dict[str, Any]:
    """The rank that is meant, as a note has it.

    Raises
    ------
    Refused: it is gone, or is another's.
    """
    assert task.pid is not None
    since = born(task.pid)
    if peek(task.pid) is None:
        raise Refused(f"process {task.pid} is no rank of yours on this host")
    return {"pid": task.pid, "born": since}


def _must(sent: bool) -> None:
    if not sent:
        raise Refused("the process has ended before")


class Kill(Fault):
    """SIGKILL to a rank."""

    def prepare(self, task: Task) -> dict[str, Any]:
        return rank(task)

    def do(self, how: dict[str, Any]) -> None:
        _must(send(how["pid"], how["born"], signal.SIGKILL))


class Node(Fault):
    """SIGKILL to all ranks on a host, and to their shepherds, as if the node had died."""

    def prepare(self, task: Task) -> dict[str, Any]:
        if not task.peers and not task.yes:
            raise Refused(
                "the run is on this one host: nothing of it would be left but its launcher",
                "say --yes, if that is meant",
            )
        shepherds = {pid: shepherd for pid in task.pids if (shepherd := shepherd_of(pid))}
        if not shepherds:
            raise Refused("no rank of yours is on this host")
        # Shepherds first, so that they have no time to tell.
        both = [*dict.fromkeys(shepherds.values()), *shepherds]
        return {"processes": [(pid, born(pid)) for pid in both]}

    def do(self, how: dict[str, Any]) -> None:
        for pid, since in how["processes"]:
            send(pid, since, signal.SIGKILL)


class Hang(Fault):
    """SIGSTOP to a rank, for a while."""

    def prepare(self, task: Task) -> dict[str, Any]:
        return rank(task)

    def do(self, how: dict[str, Any]) -> None:
        _must(send(how["pid"], how["born"], signal.SIGSTOP))

    def undo(self, how: dict[str, Any]) -> None:
        send(how["pid"], how["born"], signal.SIGCONT)


class Slow(Fault):
    """A rank that gets a part of the processor's time: stopped and continued all the time."""

    def prepare(self, task: Task) -> dict[str, Any]:
        return rank(task) | {"factor": task.amount}

    def do(self, how: dict[str, Any]) -> None:
        _must(send(how["pid"], how["born"], 0))

    def hold(self, how: dict[str, Any], over: threading.Event, seconds: float) -> None:
        end = time.monotonic() + seconds
        running = _STOPPED / max(how["factor"] - 1, 0.01)
        while time.monotonic() < end and not over.is_set():
            if not send(how["pid"], how["born"], signal.SIGSTOP):
                return
            over.wait(_STOPPED)
            send(how["pid"], how["born"], signal.SIGCONT)
            over.wait(running)

    def undo(self, how: dict[str, Any]) -> None:
        send(how["pid"], how["born"], signal.SIGCONT)


class Memory(Fault):
    """A process in the rank's control group that takes memory; it is the first the kernel kills."""

    def __init__(self) -> None:
        self._taken: list[mmap.mmap] = []

    def prepare(self, task: Task) -> dict[str, Any]:
        how = rank(task)
        group = _group(how["pid"])
        free, why = _free(group)
        if not task.yes:
            # Also of what the group may have, for the host's other users.
            free = min(free, int(_available() * (1 - _RESERVE)))
        wanted = int(free * task.amount / 100)
        if (
            group
            and group != _group(os.getpid())
            and not os.access(group / "cgroup.procs", os.W_OK)
        ):
            raise Refused(
                f"this process cannot be put into the rank's control group, {group}",
                "only root can, or who owns it",
            )
        if wanted < _PIECE:
            raise Refused(f"{why} leaves too little to take any")
        return how | {"bytes": wanted, "group": str(group or "")}

    def do(self, how: dict[str, Any]) -> None:
        Path("/proc/self/oom_score_adj").write_text("1000")
        if how["group"] and Path(how["group"]) != _group(os.getpid()):
            (Path(how["group"]) / "cgroup.procs").write_text(str(os.getpid()))

    def hold(self, how: dict[str, Any], over: threading.Event, seconds: float) -> None:
        end = time.monotonic() + seconds
        left = how["bytes"]
        while left > 0 and time.monotonic() < end and not over.is_set():
            piece = mmap.mmap(-1, min(left, _PIECE))
            self._taken.append(piece)
            for page in range(0, len(piece), mmap.PAGESIZE):
                piece[page] = 1
            left -= len(piece)
        over.wait(max(0.0, end - time.monotonic()))

    def undo(self, how: dict[str, Any]) -> None:
        # Of a process that has ended the kernel has taken it back.
        for piece in self._taken:
            piece.close()
        self._taken.clear()


def _group(pid: int) -> Path | None:
    """A process's control group, of version 2; None if there is none but the root."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::") and line != "0::/":
                return _CGROUPS / line[4:]
    return None


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _free(group: Path | None) -> tuple[int, str]:
    """Bytes that may still be taken, and who says so."""
    least, why = _available(), "the host"
    for level in (group, *group.parents) if group else ():
        with contextlib.suppress(OSError, ValueError):
            limit = int((level / "memory.max").read_text())
            free = limit - int((level / "memory.current").read_text())
            if free < least:
                least, why = free, f"the control group {level}"
    return least, why
