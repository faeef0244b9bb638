"""What a launch of the ranks comes to, by what has become known of it."""

from __future__ import annotations

import time
from dataclasses import replace

from hpcft.errors import INTERRUPTED
from hpcft.launch.cause import Death, Ending


class Outcome:
    """One launch's; the same in all shepherds that know the same.

    Attributes
    ----------
    decided: the exit code, if it does not follow from how the ranks have ended.
    reason: why, in words.
    again: it has ended for something that another launch might not meet.
    wish: why the ranks were asked to leave, for the run to end; empty if they were not.
    """

    def __init__(self) -> None:
        self.decided: int | None = None
        self.reason = ""
        self.again = False
        self.wish = ""
        #: rank -> how it ended, of those that ended as agreed
        self._endings: dict[int, Ending] = {}
        #: rank -> its death, and when it became known here
        self._deaths: dict[int, tuple[Death, float]] = {}

    def died(self, death: Death) -> None:
        """A rank is dead."""
        self._deaths[death.rank] = death, time.time()

    def explained(self, rank: int, cause: str, code: int) -> None:
        """Why a rank is dead has become known."""
        death, known = self._deaths[rank]
        self._deaths[rank] = replace(death, cause=cause, code=code), known

    def ended(self, rank: int, ending: Ending) -> None:
        """A rank has ended as agreed."""
        self._endings[rank] = ending

    def has_died(self, rank: int) -> bool:
        """Whether it is dead."""
        return rank in self._deaths

    def deaths(self) -> list[tuple[Death, float]]:
        """All deaths, the first first, each with when it became known here."""
        return sorted(self._deaths.values(), key=lambda known: known[0].at)

    @property
    def code(self) -> int:
        """The exit code."""
        if self.decided is not None:
            return self.decided
        if not self._endings:
            # Nobody came to an agreed end: the first to fail speaks for all.
            return self.deaths()[0][0].code or 3
        ill = self._ended_ill()
        return self._endings[ill].code if ill is not None else 0

    @property
    def resizes(self) -> bool:
        """Whether it has ended for nothing but to be followed by one of another size."""
        left = any(ending.code == INTERRUPTED for ending in self._endings.values())
        return left and not self.wish and self.decided is None

    @property
    def lost(self) -> bool:
        """Whether the ranks could not go on, and might if they were launched again."""
        return self.again or (self.decided is None and not self._endings)

    def why(self) -> str:
        """Why the run, or this launch, has failed."""
        deaths = self.deaths()
        ill = self._ended_ill()
        if not self.reason and ill is not None:
            return f"rank {ill} failed after the training was over: {self._endings[ill].cause}"
        if not self.reason and deaths:
            return f"all ranks failed, the last: {deaths[-1][0].cause}"
        if not self.reason and self.resizes:
            return "the ranks, which had left to be launched with others, did not start again"
        return self.reason

    def raised(self) -> int | None:
        """The first rank that failed, if all failures are by an exception or an exit code."""
        deaths = [death for death, _ in self.deaths()]
        return deaths[0].rank if deaths and all(d.code < 128 for d in deaths) else None

    def _ended_ill(self) -> int | None:
        """The first rank that failed when training was over, if one did."""
        return next((rank for rank in sorted(self._endings) if self._endings[rank].code), None)
