"""Taking in the processes that have ended below a shepherd; its rank is one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from hpcft.launch.cause import Ending
from hpcft.launch.child import Child
from hpcft.launch.warm import Warm


class Reaper:
    """To be told of every SIGCHLD.

    Parameters
    ----------
    child: the rank.
    warm: what it is forked from; learns here that it has ended.
    on_stop: called when the rank was stopped, with the time (seconds since 1970).
    on_continue: called when it was continued.
    on_end: called with how it has ended.
    """

    def __init__(
        self,
        child: Child,
        warm: Warm,
        on_stop: Callable[[float], None],
        on_continue: Callable[[], None],
        on_end: Callable[[Ending], None],
    ) -> None:
        self._child = child
        self._warm = warm
        self._on_stop = on_stop
        self._on_continue = on_continue
        self._on_end = on_end
        #: Statuses of processes that have ended: the rank may be one before its number is known.
        self._strangers: dict[int, int] = {}

    def forked(self, pid: int) -> None:
        """The rank has been forked, and is this process."""
        self._child.pid = pid
        if pid in self._strangers:
            self._on_end(self._child.end(self._strangers[pid]))

    def reap(self) -> None:
        """Take in all that has happened so far."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            over = not (os.WIFSTOPPED(status) or os.WIFCONTINUED(status))
            if over and pid == self._warm.pid:
                self._warm.ended = True
            if pid != self._child.pid:
                if over:
                    self._strangers[pid] = status
                continue
            if os.WIFSTOPPED(status):
                self._on_stop(time.time())
            elif os.WIFCONTINUED(status):
                self._on_continue()
            else:
                self._on_end(self._child.end(status))
