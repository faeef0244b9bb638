"""The other shepherds of this node, watched while there is no channel to them yet.

Until all ranks have started MPI nobody would tell of a shepherd's death: the launchers are told not
to mind, and MPI's start waits for all. All tasks of a node have the same parent (mpiexec, or the
slurmstepd of the node), so the kernel knows.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hpcft.launch.child import children

#: Seconds after which every task of the node must have been there.
_APPEAR_TIME = 15.0


class Siblings:
    """Counts the processes of this node that run the same command below the same parent.

    Parameters
    ----------
    expected: how many the launcher has started on this node, this process included.
    now: the time, in seconds.
    """

    def __init__(self, expected: int, now: float) -> None:
        self._parent = os.getppid()
        self._command = _command(os.getpid())
        self._expected = expected
        self._began = now
        self._seen: set[int] = set()

    def missing(self, now: float) -> bool:
        """Whether one of them has ended, or never came."""
        alive = {pid for pid in children(self._parent) if _command(pid) == self._command}
        gone = self._seen - alive
        self._seen |= alive
        late = now - self._began > _APPEAR_TIME
        return bool(gone) or (late and len(self._seen) < self._expected)


def _command(pid: int) -> bytes:
    """The command line; nothing for a process that has ended, reaped or not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
