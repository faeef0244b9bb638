"""The rank's process, seen from its shepherd."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from hpcft.launch.cause import Ending, ending, oom_kills

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


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
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


class Child:
    """The running rank.

    Parameters
    ----------
    command: what to run.
    environ: its environment.
    fds: descriptors it inherits.
    log: file its output goes to, beside the terminal.
    """

    def __init__(
        self, command: list[str], environ: Mapping[str, str], fds: tuple[int, ...], log: Path
    ) -> None:
        self._oom = oom_kills()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("wb", buffering=0)
        #: Which output also goes to our own stdout and stderr, and under what name.
        self.echo = False
        self.prefix = b""
        #: Whether the rank has said that it ends, and what about it.
        self.said_so = False
        self.said = ""
        self.stopped_by_us = False
        process = subprocess.Popen(
            command,
            env=environ,
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = process.pid
        # We wait for it ourselves: Popen does not tell of stops.
        process.returncode = 0
        assert process.stdout is not None
        assert process.stderr is not None
        self._pumps = [
            threading.Thread(target=self._pump, args=(pipe, out), daemon=True)
            for pipe, out in (
                (process.stdout, sys.stdout.buffer),
                (process.stderr, sys.stderr.buffer),
            )
        ]
        for pump in self._pumps:
            pump.start()

    def _pump(self, pipe: IO[bytes], out: IO[bytes]) -> None:
        # In a thread, for a file system that hangs must not keep the shepherd from its beats.
        at_line_start = True
        while data := os.read(pipe.fileno(), 1 << 16):
            with contextlib.suppress(OSError):
                self._log.write(data)
            if self.echo:
                if self.prefix:
                    first = self.prefix if at_line_start else b""
                    at_line_start = data.endswith(b"\n")
                    inner = data[:-1].replace(b"\n", b"\n" + self.prefix)
                    data = first + inner + data[-1:]
                with contextlib.suppress(OSError):
                    out.write(data)
                    out.flush()

    def flush(self) -> None:
        """Wait until all it has written is in the log, unless something else holds its pipes."""
        for pump in self._pumps:
            pump.join(0.5)

    def end(self, status: int) -> Ending:
        """What ``waitpid``'s status means."""
        return ending(status, oom_kills() > self._oom, self.said)

    def send(self, number: int) -> None:
        """Send a signal to the rank alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the rank and all processes it has started."""
        family = [self.pid, *descendants(self.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def hold(self, stop: bool) -> None:
        """Stop the rank, or let it go on."""
        self.stopped_by_us = stop
        self.send(signal.SIGSTOP if stop else signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Processor time the rank and its descendants have used so far."""
        ticks = 0
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(OSError):
                fields = _stat(pid)
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")
