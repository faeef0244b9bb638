"""Telling a rank that is stuck from one that computes or waits.

A rank that neither completes steps, nor waits for others, nor uses the processor is stuck: a
deadlock of its own threads, a read that never returns. One that computes uses the processor; one
that waits inside a collective is a victim. If *all* wait, the collective itself is stuck.

A recovery is another matter. Its calls of MPI take milliseconds, but agreements of Open MPI 5.0
have been seen to hang when processes die shortly after each other. The death of one more process
makes all of them look again, so if *all* are in a recovery that does not end, one has to go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from hpcft.world.progress import Progress, Reading

#: Share of the time a rank must have used the processor to count as computing.
_BUSY = 0.02


class _Complaints:
    """Who has lately been found to wait for too long."""

    def __init__(self, lately: float) -> None:
        self._lately = lately
        self._heard: dict[int, float] = {}

    def heard(self, rank: int, now: float) -> None:
        """``rank`` was found to, by its own shepherd."""
        self._heard[rank] = now

    def from_all(self, ranks: set[int], now: float) -> bool:
        """Whether every one of ``ranks`` has."""
        return bool(ranks) and all(
            now - self._heard.get(rank, -1e9) <= self._lately for rank in ranks
        )


class Watchdog:
    """Judges one rank from its progress page.

    Parameters
    ----------
    progress: the page.
    timeout: seconds without progress after which the rank counts as stuck; 0 means never.
    """

    def __init__(self, progress: Progress, timeout: float) -> None:
        self._progress = progress
        self._timeout = timeout
        self._last: Reading | None = None
        self._since = 0.0
        self._cpu: float | None = None
        self.complaints = _Complaints(timeout)
        #: How often the rank was found waiting for too long.
        self.times = 0

    def look(
        self, now: float, cpu_seconds: Callable[[], float]
    ) -> Literal["fine", "stuck", "waiting"]:
        """Judge.

        Parameters
        ----------
        now: a monotonic clock, in seconds.
        cpu_seconds: gives the processor time the rank has used; asked only now and then, for it
            is not cheap.
        """
        if not self._timeout:
            return "fine"
        reading = self._progress.read()
        if reading != self._last or not reading.running:
            self._last, self._since, self._cpu = reading, now, None
            return "fine"
        if self._cpu is None:
            # Only now, for while steps follow each other quickly nobody needs to know.
            self._cpu = cpu_seconds()
        if now - self._since < self._timeout:
            return "fine"
        if reading.waiting:
            self._since = now - self._timeout / 2
            self.times += 1
            return "waiting"
        if cpu_seconds() - self._cpu > _BUSY * (now - self._since):
            self._since, self._cpu = now, None
            return "fine"
        return "stuck"


class JamWatch:
    """Judges, from one rank's progress page, whether it is in a recovery that does not end.

    Parameters
    ----------
    progress: the page.
    timeout: seconds in a part of a recovery after which it counts as jammed.
    """

    def __init__(self, progress: Progress, timeout: float) -> None:
        self._progress = progress
        self._timeout = timeout
        self._last: Reading | None = None
        self._since = 0.0
        self.complaints = _Complaints(timeout)
        #: How often that was found.
        self.times = 0

    def look(self, now: float) -> bool:
        """Judge; ``now`` is a monotonic clock, in seconds. True once every half of the timeout."""
        reading = self._progress.read()
        if reading != self._last or not reading.mending:
            self._last, self._since = reading, now
        if now - self._since < self._timeout:
            return False
        self._since = now - self._timeout / 2
        self.times += 1
        return True
