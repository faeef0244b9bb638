"""Having all ranks leave at the end of the same step, by the rules in hpcft.world.departure."""

from __future__ import annotations

from collections.abc import Callable, Set

from hpcft.launch.channel import Message
from hpcft.launch.company import Company
from hpcft.launch.crew import Crew
from hpcft.world.departure import LEAVE, REPLACE, RESIZE, replacing


class Settling:
    """What one shepherd knows of the step that is to be settled.

    All shepherds come to the same step, for those of a membership's epoch know its ranks alike.
    """

    def __init__(self) -> None:
        #: epoch -> rank -> the step it was at when it was asked
        self._at: dict[int, dict[int, int]] = {}

    def at(self, epoch: int, rank: int, step: int) -> None:
        """``rank`` has said how far it is."""
        self._at.setdefault(epoch, {}).setdefault(rank, step)

    def until(self, epoch: int, active: Set[int]) -> int | None:
        """The step to leave at, in the membership of this epoch.

        Returns
        -------
        None as long as not all active ranks have said how far they are.
        """
        known = self._at.get(epoch, {})
        if not active <= known.keys():
            return None
        return max(known[rank] for rank in active) + 1


class Departures:
    """A shepherd's part in all: for the run to end, to be resized, or slow ranks to step down.

    Parameters
    ----------
    company: the shepherds.
    crew: who trains.
    tell: sends a message to the shepherd's rank.
    """

    def __init__(self, company: Company, crew: Crew, tell: Callable[[Message], None]) -> None:
        self._company = company
        self._crew = crew
        self._tell = tell
        self._settlings = {purpose: Settling() for purpose in (LEAVE, RESIZE, REPLACE)}

    def ask(self, purpose: str) -> None:
        """All are to leave: have the rank say how far it is, if it trains."""
        if self._company.rank in self._crew.active:
            fact = self._company.said(purpose)[0]
            durable = bool(fact.get("durable"))
            reason = fact["reason"]
            message = {"kind": "leave", "purpose": purpose, "reason": reason, "durable": durable}
            self._tell(message)

    def have_replaced(self) -> None:
        """Slow ranks are to step down, if they are of the present membership."""
        epoch = self._crew.epoch
        fact = self._company.said(replacing(epoch)).get(0)
        if fact and self._company.rank in self._crew.active:
            self._tell({"kind": "replace", "epoch": epoch, "worlds": fact["worlds"]})

    def answered(self, purpose: str, epoch: int, step: int) -> None:
        """The rank says how far it is: let everybody know."""
        detail = {"purpose": purpose, "epoch": epoch, "step": step}
        self._company.announce(f"at {purpose} {epoch}", self._company.rank, **detail)

    def heard(self, fact: Message) -> None:
        """Some rank's shepherd has let everybody know how far its rank is."""
        self._settlings[fact["purpose"]].at(fact["epoch"], fact["rank"], fact["step"])
        self._settle(fact["purpose"])

    def renew(self) -> None:
        """Others train now, and settle a step of their own."""
        for purpose in (LEAVE, RESIZE):
            if self._company.known(purpose):
                self.ask(purpose)
                self._settle(purpose)
        self.have_replaced()
        self._settle(REPLACE)

    def _settle(self, purpose: str) -> None:
        epoch = self._crew.epoch
        step = self._settlings[purpose].until(epoch, self._crew.active)
        if step is not None:
            self._tell({"kind": "until", "purpose": purpose, "epoch": epoch, "step": step})
