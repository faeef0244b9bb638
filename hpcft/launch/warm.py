"""The warm process that a shepherd's rank is forked from, seen from the shepherd.

See :mod:`hpcft.world.warm` for the other side. It is this shepherd's own, or that of all shepherds
of the machine (:mod:`hpcft.launch.hearth`).
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
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from hpcft.telemetry.folder import make_folder
from hpcft.world.link import CONTROL_FD, PRELOAD, STARTED_BY

#: Seconds between two attempts to ask, when too many others do.
_PAUSE = 0.02
#: How often one that may be started again is asked.
_TRIES = 5
#: Bytes of a number that a minder tells.
_NUMBER = 8


def start_warm(
    target: Sequence[str],
    preload: Sequence[str],
    environ: Mapping[str, str],
    control: socket.socket,
    stdout: int | None,
    stderr: int | None,
) -> subprocess.Popen[bytes]:
    """Start a warm process.

    Parameters
    ----------
    target: the script and its arguments, as the rank's command line has them.
    preload: modules of the user's that it is to import.
    environ: its environment.
    control: the socket it is asked over.
    stdout, stderr: where what it says itself goes; None for this process's own.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "hpcft.world.rank", *target],
        env={
            **environ,
            CONTROL_FD: str(control.fileno()),
            PRELOAD: json.dumps(list(preload)),
            STARTED_BY: str(os.getpid()),
            # To look whether there are devices must not begin to use them.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        },
        pass_fds=(control.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def socket_in(folder: int) -> str:
    """The address, in an open folder, of the socket over which a shared warm process is asked.

    However long the folder's name is: addresses are short.
    """
    return f"/proc/self/fd/{folder}/warm"


class Fork:
    """A process that was forked, and the connection to its minder.

    Attributes
    ----------
    pid: its process number.
    """

    def __init__(
        self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = pid
        self._reader = reader
        self._writer = writer

    async def news(self) -> AsyncIterator[int]:
        """What ``waitpid`` says of it: of stops, and at last of its end."""
        while True:
            try:
                status = int.from_bytes(await self._reader.readexactly(_NUMBER), "big")
            except (OSError, asyncio.IncompleteReadError):
                # Its minder was killed, and it with that.
                status = signal.SIGKILL
            yield status
            if not (os.WIFSTOPPED(status) or os.WIFCONTINUED(status)):
                return

    def close(self) -> None:
        """Hear nothing of it any more."""
        self._writer.close()


class Warm:
    """The process, and the output of all that is forked from it.

    Parameters
    ----------
    target, preload, environ: as of :func:`start_warm`, for one of this shepherd's own.
    log: file that output goes to, beside the terminal.
    shared: the folder in which the one is asked that all shepherds of the machine have; None for an
        own one.

    Attributes
    ----------
    pid: the number of the own process.
    ended: what ``waitpid`` has said of its end; to be set by who waits for it.
    learnt: the modules that it was to import besides.
    """

    def __init__(
        self,
        target: Sequence[str],
        preload: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
        shared: Path | None = None,
    ) -> None:
        make_folder(log.parent)
        self._log = log.open("ab", buffering=0)
        #: Which output also goes to our own stdout and stderr, and under what name.
        self.echo = False
        self.prefix = b""
        self.learnt: list[str] = []
        self._target = list(target)
        self._preload = list(preload)
        self._environ = dict(environ)
        self._pumps: list[threading.Thread] = []
        #: Where the output goes, and its errors.
        self._outputs = [self._pumped(out) for out in (sys.stdout.buffer, sys.stderr.buffer)]
        #: A pipe, whose other end ends what has it when this process does.
        self._switch, self._held = os.pipe()
        self.pid: int | None = None
        self.ended: int | None = None
        #: Whether an own one is known to answer no more.
        self._lost = False
        #: To reach a shared one by.
        self._folder: int | None = None
        if shared:
            self._folder = os.open(shared, os.O_DIRECTORY)
            self._control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._control.setblocking(False)
        else:
            self._start()

    def log_to(self, log: Path) -> None:
        """Have what is written from now on follow what is in ``log``."""
        former, self._log = self._log, log.open("ab", buffering=0)
        former.close()

    def revive(self) -> None:
        """Start it again if it has ended; of a shared one the launcher sees to that."""
        if self.ended is not None or self._lost:
            self._control.close()
            self._start()

    def _start(self) -> None:
        """Start an own one."""
        self.ended, self._lost = None, False
        ours, theirs = socket.socketpair()
        with theirs:
            outputs = self._outputs
            process = start_warm(self._target, self._preload, self._environ, theirs, *outputs)
        ours.setblocking(False)
        self._control = ours
        self.pid = process.pid
        # We wait for it ourselves.
        process.returncode = 0

    def _pumped(self, out: IO[bytes]) -> int:
        """A descriptor of which all that is written goes to the log, and to ``out`` if echoed."""
        pipe, theirs = os.pipe()
        pump = threading.Thread(target=self._pump, args=(pipe, out), daemon=True)
        pump.start()
        self._pumps.append(pump)
        return theirs

    def _pump(self, pipe: int, out: IO[bytes]) -> None:
        # In a thread, for a file system that hangs must not keep the shepherd from its beats.
        at_line_start = True
        while data := os.read(pipe, 1 << 16):
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

    async def fork(self, environ: Mapping[str, str], fds: Sequence[int]) -> Fork:
        """Have it fork a rank, as soon as it is warm.

        Parameters
        ----------
        environ: the rank's environment, whole.
        fds: descriptors the rank gets: its link and its page.

        Returns
        -------
        The rank. It ends when this process does.

        Raises
        ------
        ProcessLookupError: the warm process has ended before that.
        """
        wish = {"environ": dict(environ)}
        shared, asked = self._folder is not None, self.pid
        for attempt in range(_TRIES if shared else 1):
            if attempt:
                await asyncio.sleep(_PAUSE)
            try:
                reader, writer = await self._ask(wish, (*fds, *self._outputs, self._switch))
            except OSError:
                break
            try:
                pid = int.from_bytes(await reader.readexactly(_NUMBER), "big")
            except (OSError, asyncio.IncompleteReadError):
                writer.close()
                continue
            except asyncio.CancelledError:
                # The rank, if it has been forked, ends when it sees that nobody wants it.
                writer.close()
                raise
            writer.write(b"+")
            return Fork(pid, reader, writer)
        # Another who has noticed may have started it again.
        self._lost = self._lost or (not shared and asked == self.pid)
        raise ProcessLookupError("the process that ranks are forked from has ended")

    async def ready(self) -> None:
        """Wait until it has imported what it was to import so far, or has ended."""
        with contextlib.suppress(OSError):
            reader, writer = await self._ask({}, ())
            await reader.read()
            writer.close()

    def learn(self, modules: Sequence[str]) -> None:
        """Have it import these as well, for the ranks to come."""
        self.learnt += modules
        # What does not fit, were it ever so much, is left away: it is a convenience.
        with contextlib.suppress(OSError):
            self._send({"modules": list(modules)}, ())

    async def _ask(
        self, wish: Mapping[str, object], fds: Sequence[int]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Ask for something, with the connection for the answer, which closes if there is none."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                while True:
                    try:
                        self._send(wish, (theirs.fileno(), *fds))
                        break
                    except BlockingIOError:
                        await asyncio.sleep(_PAUSE)
                return await asyncio.open_unix_connection(sock=ours)
            except BaseException:
                ours.close()
                raise

    def _send(self, wish: Mapping[str, object], fds: Sequence[int]) -> None:
        if self._folder is not None:
            self._control.connect(socket_in(self._folder))
        # In a file: so it is taken as a whole or not at all, whenever who reads it is killed.
        with os.fdopen(os.memfd_create("hpcft-wish"), "wb") as file:
            file.write(json.dumps(wish).encode())
            file.flush()
            socket.send_fds(self._control, [b"?"], [file.fileno(), *fds])

    def kill(self) -> None:
        """Have nothing be forked any more by a process of our own."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def flush(self) -> None:
        """Nothing is to be forked any more: wait until all that was written is in the log.

        Unless something else holds the pipes.
        """
        for fd in self._outputs:
            os.close(fd)
        for pump in self._pumps:
            pump.join(0.5)
