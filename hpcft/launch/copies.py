"""Having other nodes keep copies, or parity, of what a rank has saved near it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hpcft.ckpt.near import Tier
from hpcft.ckpt.store import METRICS, STATE
from hpcft.launch.channel import Message
from hpcft.launch.company import Peer
from hpcft.launch.courier import Address, Courier
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet

#: Seconds between two looks at whether the node that is sent copies is still there.
_LOOK = 0.5


class Copies:
    """Of one rank's checkpoints.

    Parameters
    ----------
    courier: carries them.
    fleet: the shepherds, which keep them.
    crew: who trains.
    tiers: in which they may be saved near the rank.
    tell: sends a message to the rank.
    idle_first: nodes where nobody trains are to keep them, if there are any.
    not_gathered: told which checkpoint a spare does not get as a whole, to drain it, and why.
    """

    def __init__(
        self,
        courier: Courier,
        fleet: Fleet,
        crew: Crew,
        tiers: Sequence[Tier],
        tell: Callable[[Message], None],
        idle_first: bool = False,
        not_gathered: Callable[[str, str], None] = lambda checkpoint, why: None,
    ) -> None:
        self._courier = courier
        self._fleet = fleet
        self._crew = crew
        self._tiers = tiers
        self._tell = tell
        self._idle_first = idle_first
        self._not_gathered = not_gathered
        self._tasks: set[asyncio.Task[None]] = set()

    def make(self, number: int, checkpoint: str, files: list[str], drained: bool = False) -> None:
        """The rank has written its part of a checkpoint in a tier; answers it when that is copied.

        Parameters
        ----------
        number: of the tier.
        files: their names.
        drained: a spare is to have them as well, to write them to the directory.
        """
        # The link must be heard meanwhile.
        task = asyncio.ensure_future(self._make(number, checkpoint, files, drained))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        """Make none any more."""
        for task in self._tasks:
            task.cancel()

    async def _make(self, number: int, checkpoint: str, files: list[str], drained: bool) -> None:
        tier, why, all_files = self._tiers[number], "", files
        active = self._crew.active
        wanted = tier.copies != "none"
        partner = self._fleet.partner(active, self._idle_first) if wanted else None
        members = self._fleet.parity_set(active, tier.set_size) if tier.copies == "xor" else []
        try:
            if len(members) > 1:
                own = [name for name in files if name not in (STATE, METRICS)]
                addresses = [_address(member) for member in members]
                sending = self._courier.send_parity(
                    addresses, number, checkpoint, own[0] if own else ""
                )
                await self._unless_lost(sending, {member.rank for member in members})
                # What says where everything is is small, and everybody's.
                files = [name for name in files if name not in own]
            if partner and files:
                sending = self._courier.send(_address(partner), number, checkpoint, files)
                await self._unless_lost(sending, {partner.rank})
        except Exception as error:
            # Whatever it is: the rank waits for the answer.
            why = f"no copies on other nodes: {error or type(error).__name__}"
        if drained and (drainer := self._fleet.drainer(active)):
            copied = not why and partner is not None and partner.node == drainer.node
            there = files if copied else []
            try:
                await self._gather(drainer, number, checkpoint, all_files, there)
            except Exception as error:
                self._not_gathered(checkpoint, str(error) or type(error).__name__)
        # Only now, for until then its files are left as they are.
        self._tell({"kind": "copied", "checkpoint": checkpoint, "why": why})

    async def _gather(
        self, drainer: Peer, number: int, checkpoint: str, files: list[str], there: list[str]
    ) -> None:
        """Have files be where a spare drains them.

        Parameters
        ----------
        there: those of which its node has copies.

        Raises
        ------
        OSError: that could not be.
        """
        if drainer.rank in self._fleet.here():
            self._courier.gather(number, checkpoint, files, copies=False)
            return
        to, lost = _address(drainer), {drainer.rank}
        rest = [name for name in files if name not in there]
        if rest:
            sending = self._courier.send(to, number, checkpoint, rest, gather=True)
            await self._unless_lost(sending, lost)
        if there:
            sending = self._courier.have_gathered(to, number, checkpoint, there)
            await self._unless_lost(sending, lost)

    async def _unless_lost(self, sending: Coroutine[Any, Any, None], to: set[int]) -> None:
        """Send, unless one of those it goes to is lost, which TCP would find out after minutes.

        Raises
        ------
        OSError: that could not be.
        """
        task = asyncio.ensure_future(sending)
        try:
            while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
                if not to <= self._fleet.standing():
                    raise ConnectionError("one has failed meanwhile")
            task.result()
        finally:
            task.cancel()


def _address(peer: Peer) -> Address:
    return Address(peer.rank, peer.address, peer.courier)
