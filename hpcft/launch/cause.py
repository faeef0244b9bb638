"""How and why processes and ranks have ended."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hpcft.launch.cgroup import memory_groups


def oom_kills() -> int:
    """Number of processes the kernel has killed for memory in this process's cgroup so far.

    Reads ``memory.events`` (cgroup v2) or ``memory.oom_control`` (v1) of the own cgroup, and the
    machine's count where neither says anything.
    """
    files = [
        group / ("memory.events" if second else "memory.oom_control")
        for group, second in islice(memory_groups(), 1)
    ]
    for file in (*files, Path("/proc/vmstat")):
        for line in _lines(file):
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


@dataclass(frozen=True)
class Ending:
    """How a process ended.

    code: what the shell would call its exit code (128 + the signal's number if killed).
    cause: in words.
    """

    code: int
    cause: str


@dataclass(frozen=True)
class Death:
    """A rank is dead, or will be before it can speak again.

    cause: in words; empty if not known yet.
    at: when it failed, as far as is known, in seconds since 1970.
    code: what its exit code was, or would be.
    """

    rank: int
    cause: str
    at: float
    code: int = 137


def ending(status: int, oom: bool, said: str = "") -> Ending:
    """Put a status from ``waitpid`` into words.

    Parameters
    ----------
    oom: the kernel has killed something for memory while the process was running.
    said: what the process said about its end itself, such as an exception.
    """
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        out_of_memory = oom and number == signal.SIGKILL
        cause = f"out of memory: killed by the kernel ({name})" if out_of_memory else name
        return Ending(128 + number, f"killed by {cause}" if not out_of_memory else cause)
    code = os.WEXITSTATUS(status)
    return Ending(code, f"exit code {code}" + (f": {said}" if said else ""))
