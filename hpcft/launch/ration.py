"""When memory is short, and when there is enough again: rules, without a clock or a kernel."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from hpcft.launch.memory import Room

#: What is to stay free: this part of the limit, but no more than so many bytes, ...
_PART, _MOST = 0.1, 2 << 30
#: ... and what is going to be used in so many seconds if it goes on so.
_AHEAD = 1.5
#: How fast memory is used is taken over so many seconds.
_WINDOW = 1.0
#: Parts of what is to stay free: below it is all but used up; above, taking more is no risk.
_LAST, _EASY = 0.1, 1.5
#: Seconds in which what is left is used up if it goes on so, at which it is all but used up.
_LAST_TIME = 0.4
#: Per cent of the time in which all wait for memory, at which it is short though some seems free.
_STALLED = 20.0
#: Seconds for which there must be enough before something is taken back. Doubled when that was
#: given up again within so many times as long; and at most.
_PATIENCE, _AGAIN, _MOST_PATIENCE = 15.0, 4.0, 300.0


@dataclass(frozen=True)
class Supply:
    """How it stands.

    free: bytes that can be had.
    reserve: bytes that are to stay free.
    short: there are less.
    last: it is all but used up.
    """

    free: int
    reserve: int
    short: bool
    last: bool

    def enough_for(self, need: int) -> bool:
        """Whether so many bytes can be used besides."""
        return not self.short and self.free - need >= _EASY * self.reserve


class Ration:
    """Judges readings of the room that is left, one after another.

    Attributes
    ----------
    short_for: seconds since memory became short; 0 if it is not.
    """

    def __init__(self) -> None:
        self._readings: deque[tuple[float, Room]] = deque()
        self._short_since: float | None = None
        self.short_for = 0.0

    def look(self, room: Room, stalled: float, now: float, expected: bool = False) -> Supply:
        """Judge one more.

        Parameters
        ----------
        stalled: per cent of the time in which all processes wait for memory.
        expected: what is used more now will not go on so.
        now: a monotonic clock, in seconds.
        """
        if expected or (self._readings and self._readings[-1][1].limit != room.limit):
            # Or another limit is the tightest, of which nothing is known yet.
            self._readings.clear()
        while len(self._readings) > 1 and now - self._readings[1][0] >= _WINDOW:
            self._readings.popleft()
        growth = 0.0
        if self._readings and now > self._readings[0][0]:
            before, then = self._readings[0]
            growth = max(0.0, (then.free - room.free) / (now - before))
        self._readings.append((now, room))
        base = min(_PART * room.limit, _MOST)
        reserve = base + _AHEAD * growth
        short = room.free < reserve or (stalled > _STALLED and room.free < 2 * base)
        last = room.free < _LAST * base or room.free < min(base, _LAST_TIME * growth)
        if not short:
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        self.short_for = 0.0 if self._short_since is None else now - self._short_since
        return Supply(room.free, int(reserve), short or last, last)


class Patience:
    """How long there must be enough before something is taken back that was given up."""

    def __init__(self) -> None:
        self._seconds = _PATIENCE
        self._enough_since: float | None = None
        self._taken: float | None = None

    def given_up(self, now: float) -> None:
        """It is given up, maybe again."""
        if self._taken is not None:
            again = now - self._taken < _AGAIN * self._seconds
            self._seconds = min(2 * self._seconds, _MOST_PATIENCE) if again else _PATIENCE
        self._enough_since = self._taken = None

    def taken_back(self, enough: bool, now: float, turn: int = 0) -> bool:
        """Whether it is to be taken back now.

        Parameters
        ----------
        turn: how many others on this machine come first.
        """
        if not enough:
            self._enough_since = None
            return False
        if self._enough_since is None:
            self._enough_since = now
        if now - self._enough_since < self._seconds * (1 + turn):
            return False
        self._taken = now
        return True
