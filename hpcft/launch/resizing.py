"""Deciding that all ranks leave: to be launched anew, for somebody has come or is to go.

Or for good, as too few would be left.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

from hpcft.launch.company import Company
from hpcft.launch.crew import Crew
from hpcft.world.departure import LEAVE, RESIZE
from hpcft.world.progress import Progress

#: Seconds between somebody's coming or going and the resize, for others; and in which those who
#: belong together must come.
_GATHER_TIME, _PARTY_TIME = 0.3, 10.0


class Resizing:
    """One shepherd's part; the lowest whose rank trains speaks.

    Parameters
    ----------
    company: the shepherds.
    crew: who trains.
    progress: of the shepherd's rank.
    over: whether the launch is over.
    min_ranks: with fewer it does not go on.
    """

    def __init__(
        self,
        company: Company,
        crew: Crew,
        progress: Progress,
        over: Callable[[], bool],
        min_ranks: int,
    ) -> None:
        self._company = company
        self._crew = crew
        self._progress = progress
        self._over = over
        self._least = max(min_ranks, 1)
        #: Since when others are waited for, if they are.
        self._gathering: float | None = None

    def consider(self) -> None:
        """Somebody has come, or is to go, or the ranks are others."""
        retiring = self._company.retiring()
        if retiring and len(self._company.expected()) < self._least:
            self._end(min(retiring))
        elif self._wanted() and self._gathering is None:
            self._gathering = asyncio.get_running_loop().time()
            self._gather()

    def _gather(self) -> None:
        asyncio.get_running_loop().call_later(_GATHER_TIME, self._resize)

    def _end(self, rank: int) -> None:
        """Of those that are to go all shepherds know alike, so that none has to decide."""
        if not (self._over() or self._company.known(LEAVE)):
            reason = self._company.said("retire")[rank]["reason"]
            self._company.announce(LEAVE, 0, reason=reason, code=128 + signal.SIGTERM)

    def _wanted(self) -> bool:
        """Whether there is to be one, and this shepherd is to say so."""
        if self._over() or self._company.known(RESIZE):
            return False
        training = self._company.standing() & self._crew.active
        wished = bool(self._company.guests() or self._company.retiring())
        return wished and self._company.rank == min(training, default=-1)

    def _resize(self) -> None:
        assert self._gathering is not None
        if not self._wanted():
            self._gathering = None
            return
        now = asyncio.get_running_loop().time()
        others = self._company.awaited() and now < self._gathering + _PARTY_TIME
        if others or not self._progress.read().running:
            self._gather()
            return
        self._gathering = None
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
