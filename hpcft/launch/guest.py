"""Coming to a run from outside: by its door, as a guest of its shepherds.

Who knows the door (:mod:`hpcft.launch.door`) connects to any one of the shepherds, takes part in
the facts (:mod:`hpcft.launch.fleet`), and may so become a rank of the next launch, or have others
leave.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

from hpcft.errors import HpcftError
from hpcft.launch.channel import Connection, Message, connect
from hpcft.launch.company import GUESTS, Company
from hpcft.launch.door import Door
from hpcft.telemetry.rundir import RunDirectory

#: Seconds in which a shepherd has to answer.
_ANSWER_TIME = 3.0
#: Seconds in which a run that has no door, or behind whose door is nobody, may get one: it may just
#: be relaunched.
_DOOR_TIME = 30.0


class Guest(Company):
    """This process as a guest."""

    def __init__(self, connection: Connection, number: int, door: Door) -> None:
        super().__init__(number, list(door.peers), _nothing)
        self._connection = connection
        self._reading = asyncio.ensure_future(self._read())

    @property
    def gone(self) -> bool:
        # The launch is over, or the shepherd is lost.
        return self._reading.done()

    async def wait(self, condition: Callable[[], bool]) -> bool:
        """Wait until something is known; whether it is, or the connection has gone before."""
        while not condition():
            if self.gone:
                return condition()
            await asyncio.sleep(0.02)
        return True

    async def leave(self) -> None:
        self.announce("bye", self.rank)
        self._reading.cancel()
        await self._connection.close()

    async def _read(self) -> None:
        try:
            while (message := await self._connection.receive()) is not None:
                self._learn(message, self._connection)
        except OSError:
            pass

    def _learn(self, fact: Message, origin: Connection | None) -> None:
        if not self._note(fact):
            return
        if origin is None:
            self._connection.send(fact)
        self.on_fact(fact)


async def visit(rundir: RunDirectory, former: Door | None = None) -> tuple[Guest, Door]:
    """Come to a run as a guest.

    Parameters
    ----------
    former: a door that leads nowhere, though somebody may still answer there; another is waited
        for.

    Raises
    ------
    HpcftError: it has ended, takes no guests, or does not answer.
    """
    deadline = time.monotonic() + _DOOR_TIME
    while True:
        if summary := rundir.summary():
            raise HpcftError(f"the run in {rundir.path} has ended: {summary['result']}")
        content = rundir.door()
        door = Door.of(content) if content else None
        if door and door.closed:
            raise HpcftError(f"the run in {rundir.path} cannot be resized: {door.closed}")
        if door and former and door.secret == former.secret:
            door = None
        guest = await _enter(door) if door else None
        if door and guest:
            return guest, door
        if time.monotonic() > deadline:
            raise HpcftError(
                f"nobody answers for the run in {rundir.path}",
                "see `hpcft ps`; its nodes must be reached from here, and its training have begun",
            )
        await asyncio.sleep(0.2)


async def _enter(door: Door) -> Guest | None:
    number = GUESTS + secrets.randbelow(1 << 30)
    for peer in door.peers:
        try:
            connection = await asyncio.wait_for(
                connect(peer.address, peer.port, bytes.fromhex(door.secret), number), _ANSWER_TIME
            )
        except (OSError, asyncio.TimeoutError):
            continue
        return Guest(connection, number, door)
    return None


def _nothing(fact: Message) -> None:
    """Until somebody wants to hear of facts."""
