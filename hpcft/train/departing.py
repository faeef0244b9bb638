"""What was asked for from outside, at the end of a step (:mod:`hpcft.world.departure`)."""

from __future__ import annotations

from hpcft.train.health import Health
from hpcft.train.interruption import StepInterrupted
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.state import State
from hpcft.train.teller import Teller
from hpcft.world.departure import Departure, Replacement
from hpcft.world.recovery import World


class Leaving(BaseException):
    """All leave at the end of this step, for the run was asked to end."""


class Replacing(BaseException):
    """At the end of this step slow ranks change places with spares."""


class Departing:
    """Looks whether this is the step at whose end all leave, or slow ranks step down.

    Attributes
    ----------
    steps_down: whether this rank is to.
    """

    def __init__(
        self,
        state: State,
        world: World,
        group: WorldProcessGroup,
        health: Health,
        teller: Teller,
    ) -> None:
        self._state = state
        self._world = world
        self._group = group
        self._health = health
        self._teller = teller
        self.steps_down = False

    def look(self) -> None:
        """A step is completed.

        Raises
        ------
        Leaving, Replacing: it is the one.
        StepInterrupted: a rank has failed.
        """
        if link := self._world.link:
            for departure in link.departures.asked():
                self._leave_or_go_on(departure)
            if link.departures.replacement.asked:
                self._replace_or_go_on(link.departures.replacement)

    def _leave_or_go_on(self, departure: Departure) -> None:
        if self._health.apart:
            # Each at a step of its own.
            raise Leaving
        if self._is_over(departure):
            raise Leaving
        if self._health.failed_anywhere():
            raise StepInterrupted

    def _replace_or_go_on(self, replacement: Replacement) -> None:
        over = self._is_over(replacement)
        if over and (self._state.sharded() or not self._group.healable):
            # That would cost all a start of their scripts; the same is found by all.
            replacement.forget()
            if self._world.logical == 0:
                sharded = self._state.sharded()
                what = "its state is sharded" if sharded else "it uses groups of some ranks"
                self._teller.say(f"hpcft: no rank is replaced while this script runs, as {what}")
        elif over:
            self.steps_down = self._world.world in replacement.worlds
            self._world.gather()
            raise Replacing
        elif self._health.failed_anywhere():
            raise StepInterrupted

    def _is_over(self, departure: Departure) -> bool:
        with self._world.progress.waiting():
            return departure.over(self._state.step, self._health.failed_anywhere)
