"""Deciding that all ranks leave to be launched anew: somebody has come, or is to go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hpcft.launch.company import Company
from hpcft.launch.crew import Crew
from hpcft.world.departure import RESIZE
from hpcft.world.progress import Progress

#: Seconds between a guest and the resize, for others that come with it.
_GATHER_TIME = 0.3


class Resizing:
    """One shepherd's part; the lowest whose rank trains speaks.

    Parameters
    ----------
    company: the shepherds.
    crew: who trains.
    progress: of the shepherd's rank.
    over: whether the launch is over.
    """

    def __init__(
        self, company: Company, crew: Crew, progress: Progress, over: Callable[[], bool]
    ) -> None:
        self._company = company
        self._crew = crew
        self._progress = progress
        self._over = over
        self._gathering = False

    def consider(self) -> None:
        """Somebody has come, or is to go, or the ranks are others."""
        if self._wanted() and not self._gathering:
            self._gathering = True
            asyncio.get_running_loop().call_later(_GATHER_TIME, self._resize)

    def _wanted(self) -> bool:
        """Whether there is to be one, and this shepherd is to say so."""
        if self._over() or self._company.known(RESIZE):
            return False
        training = self._company.standing() & self._crew.active
        wished = bool(self._company.guests() or self._company.retiring())
        return wished and self._company.rank == min(training, default=-1)

    def _resize(self) -> None:
        self._gathering = False
        if not self._wanted():
            return
        if not self._progress.read().running:
            self.consider()
            return
        coming, going = self._company.guests(), self._company.retiring()
        hosts = self._company.hosts
        words = [_named("joins", "join", list(coming.values()))] if coming else []
        words += [_named("leaves", "leave", [hosts[rank] for rank in going])] if going else []
        # What is near the ranks goes with those who leave.
        self._company.announce(RESIZE, 0, reason=", ".join(words), durable=bool(going))


def _named(one: str, several: str, hosts: list[str]) -> str:
    """``n1, n1 and n2 join``."""
    names = sorted(hosts)
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{listed} {one if len(names) == 1 else several}"
