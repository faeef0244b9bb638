"""Control groups of one's own, with a limit on memory; making them needs root."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")
#: Seconds for what is left in a group to end.
_PATIENCE = 5.0


class MemoryGroup:
    """A control group (v2, or v1); use as a context manager, at the end of which it is emptied.

    Parameters
    ----------
    name: its directory's.

    Raises
    ------
    SystemExit: none can be made here.
    """

    def __init__(self, name: str) -> None:
        first = _TOP / "memory"
        controllers = _TOP / "cgroup.controllers"
        second = controllers.exists() and "memory" in controllers.read_text().split()
        self._limit = "memory.max" if second else "memory.limit_in_bytes"
        self._used = "memory.current" if second else "memory.usage_in_bytes"
        self._kills = "memory.events" if second else "memory.oom_control"
        self.path = (_TOP if second else first) / f"{name}-{os.getpid()}"
        try:
            if second:
                with contextlib.suppress(OSError):
                    (_TOP / "cgroup.subtree_control").write_text("+memory")
            self.path.mkdir()
            self.limit(1 << 40)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            raise SystemExit(f"no control group with a limit on memory: {error}") from error

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            for pid in (self.path / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.05)

    def enter(self) -> None:
        """Have this process in it, and all that it will start."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def limit(self, size: int) -> None:
        """Allow so many bytes."""
        (self.path / self._limit).write_text(str(size))

    @property
    def used(self) -> int:
        """Bytes that are used, of files' pages those included that could be given up."""
        return int((self.path / self._used).read_text())

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed in it for memory."""
        lines = (self.path / self._kills).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
