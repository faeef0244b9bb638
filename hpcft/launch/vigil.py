"""Watching whether a rank that trains gets on, with the others' watches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from hpcft.launch.child import Child
from hpcft.launch.company import Company
from hpcft.launch.crew import Crew
from hpcft.launch.watchdog import JamWatch, Watchdog
from hpcft.world.link import STACKS_SIGNAL
from hpcft.world.progress import Progress

#: Seconds after which a recovery that all are in counts as jammed.
_JAM_TIME = 10.0
#: Seconds a rank gets to write down its stacks.
_STACKS_TIME = 0.2


class Vigil:
    """Over one rank.

    Parameters
    ----------
    company: the shepherds.
    crew: who trains.
    timeout: seconds without progress after which the rank counts as stuck; 0 means never.
    kill: ends the rank, for a cause, that has been there since some time (seconds since 1970).
    end: ends the launch, for a reason.
    """

    def __init__(
        self,
        company: Company,
        crew: Crew,
        child: Child,
        progress: Progress,
        timeout: float,
        kill: Callable[[str, float], None],
        end: Callable[[str], None],
    ) -> None:
        self._company = company
        self._crew = crew
        self._child = child
        self._timeout = timeout
        self._kill = kill
        self._end = end
        self._watchdog = Watchdog(progress, timeout)
        self._jams = JamWatch(progress, _JAM_TIME)

    def heard_stuck(self, rank: int) -> None:
        """A rank waits in a collective, and nothing moves."""
        self._watchdog.complaints.heard(rank, time.monotonic())

    def heard_jam(self, rank: int) -> None:
        """A rank is in a recovery that does not end."""
        self._jams.complaints.heard(rank, time.monotonic())

    async def keep(self) -> None:
        """Watch, until the rank had to be killed."""
        while True:
            await asyncio.sleep(min(0.5, self._timeout / 8) if self._timeout else 0.5)
            if self._child.stopped_by_us:
                continue
            now = time.monotonic()
            if self._jams.look(now):
                self._company.announce(f"jam {self._jams.times}", self._company.rank)
                if self._has_to_go(now):
                    cause = f"stuck in a recovery for {_JAM_TIME:g} s"
                    await self._kill_stuck(cause, _JAM_TIME)
                    return
            finding = self._watchdog.look(now, self._child.cpu_seconds)
            if finding == "stuck":
                cause = f"stuck: no step for {self._timeout:g} s"
                await self._kill_stuck(cause, self._timeout)
                return
            if finding == "waiting":
                self._company.announce(f"stuck {self._watchdog.times}", self._company.rank)
                alive = self._crew.active - self._company.known("dead")
                if self._watchdog.complaints.from_all(alive, now):
                    await self._write_stacks()
                    self._end(
                        "all ranks wait for each other and no step advances; their stacks are "
                        "in the logs"
                    )

    def _has_to_go(self, now: float) -> bool:
        """Whether all are in a recovery that is jammed, and this rank is the one that gives way.

        A spare is missed less than a rank with the state; beyond that, who coordinates MPI's
        agreement, which is the lowest, is the likeliest to bring it to its end by going.
        """
        alive = self._company.hosts.keys() - self._company.known("dead")
        first = min(alive, key=lambda rank: (rank in self._crew.active, rank))
        return first == self._company.rank and self._jams.complaints.from_all(alive, now)

    async def _kill_stuck(self, cause: str, seconds: float) -> None:
        await self._write_stacks()
        self._kill(cause, time.time() - seconds)

    async def _write_stacks(self) -> None:
        self._child.send(STACKS_SIGNAL)
        await asyncio.sleep(_STACKS_TIME)
