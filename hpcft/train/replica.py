"""This rank's copy of what is trained."""

from __future__ import annotations

from contextlib import AbstractContextManager

from hpcft.train.state import Savepoint, State


class Replica:
    """The state in this rank, and how far it can be relied on.

    Attributes
    ----------
    begun: it is, or follows from, the state that all begin with, which is rank 0's.
    whole: it can be handed to others as it is.
    broken: it has been hit in the middle of a step, and is no state at all.
    """

    def __init__(self, state: State, begun: bool) -> None:
        self.state = state
        self.begun = begun
        self.whole = True
        self.broken = False
        self._savepoint = Savepoint(state)

    def received(self) -> None:
        """It is the one that training goes on from."""
        self.begun = self.whole = True
        self._savepoint = Savepoint(self.state)

    def renew(self) -> None:
        """A step is completed: what is broken off next goes back to here."""
        self._savepoint.renew()

    def restore(self) -> None:
        """The step that is under way is broken off: go back to where it began."""
        self._savepoint.restore()

    def brought_back(self) -> AbstractContextManager[None]:
        """Within it the state is as the step that is under way began with it."""
        return self._savepoint.brought_back()
