"""A process beside a parked spare that does something useful, seen from the spare's shepherd.

It is forked from the warm process, as ranks are (:mod:`hpcft.world.bystander`). It shares nothing
with the spare, so it is dropped by being killed, whatever it is in the middle of: the kernel takes
its memory, the processes that it has started, and what it holds of a device. Nobody waits for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpcft.launch.channel import Message
from hpcft.launch.link import Link
from hpcft.launch.warm import Fork, Warm
from hpcft.world.progress import Progress


class Bystander:
    """Started and dropped as the spare is parked and needed, any number of times.

    Parameters
    ----------
    warm: what it is forked from.
    heard: told what it says of what it does.
    ended: told why it has ended by itself; it is not started again then.
    """

    def __init__(
        self, warm: Warm, heard: Callable[[Message], None], ended: Callable[[str], None]
    ) -> None:
        self._warm = warm
        self._heard = heard
        self._ended = ended
        self._task: asyncio.Task[None] | None = None
        #: That, and those that were dropped and have not noticed yet.
        self._tasks: set[asyncio.Task[None]] = set()
        self._pid: int | None = None
        self._wanted = False

    def start(
        self,
        environ: Mapping[str, str],
        options: Mapping[str, Any],
        ranks: int,
        runs: Sequence[str] = (),
    ) -> None:
        """Have it run, unless it does.

        Parameters
        ----------
        environ: the spare's.
        options: what a rank is told.
        ranks: how many train.
        runs: what it runs in place of the script, as on a command line.
        """
        self._wanted = True
        if self._task is None:
            told = json.dumps({**options, "bystander": {"ranks": ranks, "runs": list(runs)}})
            running = self._run({**environ, "HPCFT_RUN": told})
            self._task = task = asyncio.ensure_future(running)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def drop(self) -> None:
        """Have it end at once."""
        self._wanted = False
        # One that is being forked ends as soon as its number is known.
        self._kill()
        self._task = None

    def _kill(self) -> None:
        if self._pid is not None:
            _kill_all_of(self._pid)
            self._pid = None

    async def _run(self, environ: Mapping[str, str]) -> None:
        me = asyncio.current_task()
        link, page = await Link.create(), Progress.create()
        why = "its process has ended, maybe for lack of memory"
        try:
            fork = await self._fork(environ, (link.theirs.fileno(), page.fd))
            # It tells itself of all that matters.
            fork.close()
            pid = fork.pid
            if self._task is not me:
                # Dropped meanwhile.
                _kill_all_of(pid)
                return
            self._pid = pid
            link.theirs.close()
            # A broken pipe is how a process ends that is killed.
            with contextlib.suppress(OSError):
                async for message in link.messages():
                    if self._task is me:
                        why = self._take(message) or why
        except ProcessLookupError as error:
            why = str(error)
        finally:
            link.theirs.close()
            link.close()
            os.close(page.fd)
        if self._task is me:
            # By itself: what is wrong would be so again. It may have left others.
            self._kill()
            self._ended(why)

    async def _fork(self, environ: Mapping[str, str], fds: tuple[int, int]) -> Fork:
        try:
            return await self._warm.fork(environ, fds)
        except ProcessLookupError:
            if not self._wanted:
                raise
            # A library that the script needs has started threads in it, which ends it.
            self._warm.revive()
            return await self._warm.fork(environ, fds)

    def _take(self, message: Message) -> str:
        """Pass on what it says; what it says about its own end, if it is that."""
        kind = message["kind"]
        if kind == "said":
            return str(message["text"])
        if kind == "abort":
            # It waits to be ended.
            self._kill()
            return str(message["reason"])
        self._heard(message)
        return ""


def _kill_all_of(pid: int) -> None:
    """Kill a process and all that it has started: it leads a group of its own, or is about to."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
