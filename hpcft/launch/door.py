"""The door of a run: a file by which others come to it.

It is in the run directory, its user alone can read it, and it has where the shepherds of the
present launch listen and their secret.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.launch.company import Peer
from hpcft.telemetry.rundir import RunDirectory


@dataclass(frozen=True)
class Door:
    """How to get into a run.

    launch: which one the shepherds look after, from 1.
    secret: theirs, in hexadecimal digits.
    peers: where they are.
    argv, cwd: the run's command line, and where it was given.
    modules: what a script like this imports.
    sizes: how many ranks train at first, ever, and are parked.
    min_ranks: with how many it goes on.
    closed: why it takes no guests, with a remedy; empty if it does.
    """

    launch: int
    secret: str
    peers: tuple[Peer, ...]
    argv: tuple[str, ...]
    cwd: str
    modules: tuple[str, ...]
    sizes: tuple[int, int, int]
    min_ranks: int
    closed: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: dict[str, Any]) -> Door:
        peers = tuple(Peer(**peer) for peer in content["peers"])
        lists = {name: tuple(content[name]) for name in ("argv", "modules", "sizes")}
        return cls(**{**content, **lists, "peers": peers})


class Doorkeeper:
    """Lets others know how to come to a launch; the run goes on without if that fails.

    Parameters
    ----------
    door: as it is at first.
    """

    def __init__(self, rundir: RunDirectory, door: Door) -> None:
        self._rundir = rundir
        self._door = door
        self._lock = threading.Lock()

    def open(self, modules: Sequence[str]) -> None:
        """Make it, or make it anew as more is known.

        Parameters
        ----------
        modules: what a script like this imports.
        """
        self._door = replace(self._door, modules=tuple(modules))
        # In a thread, for a file system that hangs must not keep the shepherd.
        Errand(self._write)

    def _write(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._rundir.write_door(self._door.to_json())
