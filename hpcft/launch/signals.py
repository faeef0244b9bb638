"""What a shepherd takes signals for."""

from __future__ import annotations

import enum
import math
import signal

#: Signals that end a run, and those that only warn of its end.
ENDS = (signal.SIGTERM, signal.SIGINT)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
#: Seconds within which a second SIGTERM is the first once more: Slurm sends it to all processes of
#: a job, and srun, if it is among them, passes it on.
_ECHO_TIME = 3.0


class Meaning(enum.Enum):
    """What is wanted.

    NOTHING: nothing that could be done: there is nowhere to save to.
    LEAVE: that all ranks save, and the run ends.
    END: that the run ends at once.
    """

    NOTHING = enum.auto()
    LEAVE = enum.auto()
    END = enum.auto()


class Signals:
    """Those that one launch gets.

    Parameters
    ----------
    can_save: whether ranks have somewhere to save to.
    """

    def __init__(self, can_save: bool) -> None:
        self._can_save = can_save
        #: When the first that ends has come.
        self._first = math.inf

    def meaning(self, number: int, now: float, can_leave: bool) -> Meaning:
        """What a signal means that has come.

        Parameters
        ----------
        now: a monotonic clock, in seconds.
        can_leave: whether the ranks have begun, and still could save before they end.
        """
        ends = number in ENDS
        again = ends and now > self._first + (_ECHO_TIME if number == signal.SIGTERM else 0)
        if ends:
            self._first = min(self._first, now)
        elif not self._can_save:
            return Meaning.NOTHING
        if again or not (self._can_save and can_leave):
            return Meaning.END
        return Meaning.LEAVE
