"""Taking in the processes that have ended below a shepherd."""

from __future__ import annotations

import os

from hpcft.launch.warm import Warm


def take_in(warm: Warm) -> None:
    """Take in all that have ended so far; to be called at every SIGCHLD.

    Parameters
    ----------
    warm: learns here that its process has ended.
    """
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if pid == warm.pid:
            warm.ended = status
