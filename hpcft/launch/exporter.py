"""Serving the run's metrics: ``hpcft metrics --serve``, as a child of the shepherd that speaks.

A process of its own, for it reads files, which may hang, and a shepherd has to be quick. It goes on
while ranks are launched again; should its node be lost, whoever speaks then starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Callable

from hpcft.launch import command
from hpcft.launch.options import RunOptions
from hpcft.telemetry.rundir import RunDirectory

#: Seconds between two looks.
_PERIOD = 1.0
#: Seconds until one that has ended is started again; each time twice as long, up to the second.
_AGAIN, _MOST = 1.0, 60.0


class Exporter:
    """Of one task; lasts through all launches."""

    def __init__(self, options: RunOptions) -> None:
        self._address = options.metrics
        self._rundir = RunDirectory(options.run_dir)
        self._quiet = not options.verbose
        self._process: subprocess.Popen[bytes] | None = None
        self._next = 0.0
        self._pause = _AGAIN

    async def keep(self, speaks: Callable[[], bool]) -> None:
        """Have metrics be served while this task is the one to do it; for ever.

        Parameters
        ----------
        speaks: whether it is.
        """
        while self._address:
            if not speaks():
                self.close()
            elif not self._serves and time.monotonic() >= self._next:
                self._start()
            await asyncio.sleep(_PERIOD)

    @property
    def _serves(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        where = ["--serve", str(self._address), "--address", str(self._rundir.metrics_file)]
        words = ["metrics", str(self._rundir.path), *where]
        self._process = command.start(words, self._quiet, signal.SIGTERM)
        self._next = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, _MOST)

    def close(self) -> None:
        """Have it end."""
        process, self._process = self._process, None
        if process:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
