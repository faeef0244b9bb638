"""One warm process for all shepherds of a machine, kept by their launcher.

It costs seconds of a processor to become warm, and hundreds of megabytes; so the shepherds that a
launcher starts on its own machine share one. It is the launcher's child, and ends with it and with
no shepherd. Shepherds ask over a socket in the launcher's folder, which is for its user alone. The
launcher keeps the socket open: what is asked while the process is being started again waits there.
What a rank inherits from it (limits, processors, control group) is as its shepherd has it, for
mpiexec passes all that on.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from hpcft.launch.warm import socket_in, start_warm

#: Environment variable by which the launcher tells the shepherds in which folder to ask.
WARM = "HPCFT_WARM"
#: A process that ends within so many seconds has come to nothing; after so many of them there is
#: to be no other.
_VAIN_TIME, _VAIN = 1.0, 3


class Hearth:
    """The launcher's part.

    Parameters
    ----------
    target, preload, environ: as of :func:`hpcft.launch.warm.start_warm`.
    folder: for the socket.
    """

    def __init__(
        self,
        target: Sequence[str],
        preload: Sequence[str],
        environ: Mapping[str, str],
        folder: Path,
    ) -> None:
        self._target = target
        self._preload = preload
        self._environ = environ
        self._folder = os.open(folder, os.O_DIRECTORY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(socket_in(self._folder))
        self._vain = 0
        self._start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def _start(self) -> None:
        # What a shepherd does not get for its rank is said to the user directly.
        outputs = (_inherited(sys.stdout), _inherited(sys.stderr))
        self._process = start_warm(
            self._target, self._preload, self._environ, self._socket, *outputs
        )
        self._started = time.monotonic()

    def tend(self) -> None:
        """Start it again if it has ended, unless that is in vain: then nobody is to wait for it."""
        if self._socket.fileno() < 0 or self._process.poll() is None:
            return
        quick = time.monotonic() - self._started < _VAIN_TIME
        self._vain = self._vain + 1 if quick else 0
        if self._vain < _VAIN:
            self._start()
        else:
            self._refuse()

    def put_out(self) -> None:
        """End it."""
        self._refuse()
        os.close(self._folder)
        self._process.kill()
        self._process.wait()

    def _refuse(self) -> None:
        """Have nobody wait for an answer."""
        self._socket.close()


def _inherited(stream: IO[str] | None) -> int | None:
    """For Popen: the same output as this process's, if that is open."""
    return subprocess.DEVNULL if stream is None else None
