"""What all kinds of faults have in common."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.errors import HpcftError


class Refused(HpcftError):
    """A fault cannot be done here, or could not be undone; nothing has been."""


@dataclass(frozen=True)
class Task:
    """A fault as the host concerned gets it.

    kind, seconds, amount, newest: as of :class:`hpcft.chaos.schedule.Order`.
    run_dir: of the run.
    pid: of the rank concerned; None if it is none.
    pids: of all ranks on the host.
    peers: addresses of the run's other hosts.
    checkpoints: where they are; empty if there are none.
    yes: the user accepts faults that others on the host feel as well; ``shared``: also others
        who use the same file system.
    """

    kind: str
    seconds: float
    amount: float
    newest: bool
    run_dir: Path
    pid: int | None
    pids: tuple[int, ...]
    peers: tuple[str, ...]
    checkpoints: str
    yes: bool
    shared: bool


class Fault(ABC):
    """A kind of fault."""

    @abstractmethod
    def prepare(self, task: Task) -> dict[str, Any]:
        """See that it can be done, and undone.

        Returns
        -------
        All that is needed for that.

        Raises
        ------
        Refused: it cannot.
        """

    @abstractmethod
    def do(self, how: dict[str, Any]) -> None:
        """Do it.

        Raises
        ------
        OSError, HpcftError: it cannot be done; what has been is undone by :meth:`undo`.
        """

    def hold(self, how: dict[str, Any], over: threading.Event, seconds: float) -> None:
        """It is done; come back after some seconds, or earlier if it is to be over."""
        over.wait(seconds)

    def undo(self, how: dict[str, Any]) -> None:
        """As it was before; may be called again, in another process, or when nothing was done."""
        # Who was killed stays so.
        return
