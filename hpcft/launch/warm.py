"""The warm process of a shepherd, seen from the shepherd: what its ranks are forked from.

See :mod:`hpcft.world.warm` for the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hpcft.world.link import CONTROL_FD


class Warm:
    """The process, and the output of all that is forked from it.

    Parameters
    ----------
    target: the script and its arguments, as the rank's command line has them.
    preload: modules of the user's that it is to import.
    environ: its environment.
    log: file its output goes to, beside the terminal.

    Attributes
    ----------
    pid: its process number.
    ended: whether it has; to be set by who waits for it.
    learnt: the modules that it was to import besides.
    """

    def __init__(
        self, target: Sequence[str], preload: Sequence[str], environ: Mapping[str, str], log: Path
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab", buffering=0)
        #: Which output also goes to our own stdout and stderr, and under what name.
        self.echo = False
        self.prefix = b""
        self.learnt: list[str] = []
        self._target = list(target)
        self._preload = list(preload)
        self._environ = dict(environ)
        self._pumps: list[threading.Thread] = []
        #: Held from a question to its answer.
        self._asking = asyncio.Lock()
        self.start()

    def log_to(self, log: Path) -> None:
        """Have what is written from now on follow what is in ``log``."""
        former, self._log = self._log, log.open("ab", buffering=0)
        former.close()

    def start(self) -> None:
        """Start it; again, when it has ended."""
        self.ended = False
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcft.world.rank", *self._target],
            env={
                **self._environ,
                CONTROL_FD: str(theirs.fileno()),
                # To look whether there are devices must not begin to use them.
                "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            },
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        theirs.close()
        ours.setblocking(False)
        self._control = ours
        self.pid = process.pid
        # We wait for it ourselves: Popen does not tell of stops.
        process.returncode = 0
        assert process.stdout is not None
        assert process.stderr is not None
        pipes = ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
        for pipe, out in pipes:
            pump = threading.Thread(target=self._pump, args=(pipe, out), daemon=True)
            pump.start()
            self._pumps.append(pump)
        if self._preload:
            self._tell({"preload": self._preload})

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

    async def fork(self, environ: Mapping[str, str], fds: Sequence[int]) -> int:
        """Have it fork a rank, as soon as it is warm.

        Parameters
        ----------
        environ: the rank's environment, whole.
        fds: descriptors the rank gets: its link and its page.

        Returns
        -------
        The rank's process number; it is a child of this process.

        Raises
        ------
        ProcessLookupError: the warm process has ended before that.
        """
        loop = asyncio.get_running_loop()
        async with self._asking:
            try:
                self._ask({"environ": dict(environ), "parent": os.getpid()}, fds)
                answer = await loop.sock_recv(self._control, 8)
            except OSError:
                answer = b""
        if len(answer) < 8:
            raise ProcessLookupError("the warm process has ended")
        return int.from_bytes(answer, "big")

    def learn(self, modules: Sequence[str]) -> None:
        """Have it import these as well, for the ranks to come."""
        self.learnt += modules
        self._tell({"modules": list(modules)})

    def _tell(self, wish: dict[str, list[str]]) -> None:
        # What does not fit, were it ever so much, is left away: it is a convenience.
        with contextlib.suppress(OSError):
            self._ask(wish)

    def _ask(self, wish: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        # In a file: so it is taken as a whole or not at all, whenever who reads it is killed.
        with os.fdopen(os.memfd_create("hpcft-wish"), "wb") as file:
            file.write(json.dumps(wish).encode())
            file.flush()
            socket.send_fds(self._control, [b"?"], [file.fileno(), *fds])

    async def ready(self) -> None:
        """Wait until it has imported what it was to import so far, or has ended."""
        loop = asyncio.get_running_loop()
        async with self._asking:
            with contextlib.suppress(OSError):
                self._ask({"ready": True})
                await loop.sock_recv(self._control, 8)

    def kill(self) -> None:
        """Have nothing be forked any more."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def flush(self) -> None:
        """Wait until all that was written is in the log, unless something else holds the pipes."""
        for pump in self._pumps:
            pump.join(0.5)
