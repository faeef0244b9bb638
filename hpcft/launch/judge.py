"""Judging, while a run goes on, whose process is slower than the others.

Every rank's laps come to its shepherd, which makes a :class:`Note` of them now and then and lets
all know. When there is a new note of every rank that trains they are compared: that is a round. A
process is a straggler when it was far behind in several rounds in a row, and no longer when it was
like the others in as many. It is the computing time that is compared: who waits for a slow rank is
its victim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from statistics import median_low

from hpcft.launch.channel import Message
from hpcft.telemetry.laps import quantile
from hpcft.telemetry.outliers import Standing, compare

#: Rounds in a row that a process must have been slow in, or not, for that to be said.
_ROUNDS = 3
#: Steps that a note is of, at the least.
_STEPS = 5
#: Seconds between two notes of a rank, and for each rank of the run what is added to them, so that
#: a large run is not busy with notes.
_PERIOD, _FOR_A_RANK = 1.0, 0.01


@dataclass(frozen=True)
class Note:
    """How long its steps have taken a process of late.

    world, logical: its world rank, and its logical one.
    epoch: the membership's.
    step: the last of them.
    compute: seconds of computing in a step, the median.
    waiting: seconds of waiting in a step, the mean.
    began: when the first of them began; seconds since 1970.
    """

    world: int
    logical: int
    epoch: int
    step: int
    compute: float
    waiting: float
    began: float

    @classmethod
    def of(cls, message: Message) -> Note:
        """From a message that has its fields, and maybe more."""
        return cls(**{field.name: message[field.name] for field in fields(cls)})


class Laps:
    """The laps of one rank, made notes of."""

    def __init__(self, size: int) -> None:
        self._period = _PERIOD + _FOR_A_RANK * size
        self._clear(-1)

    def _clear(self, epoch: int) -> None:
        self._epoch = epoch
        self._buckets: Counter[int] = Counter()
        self._waiting = 0.0
        self._began = 0.0

    def add(self, world: int, lap: Message) -> Note | None:
        """A lap is over; returns a note if it is time for one."""
        if lap["epoch"] != self._epoch:
            self._clear(lap["epoch"])
        if not self._buckets:
            self._began = lap["began"]
        self._buckets.update({int(number): count for number, count in lap["buckets"].items()})
        self._waiting += lap["waiting"]
        steps = self._buckets.total()
        if steps < _STEPS or lap["ended"] - self._began < self._period:
            return None
        compute = quantile(self._buckets, 0.5)
        waiting, began = self._waiting / steps, self._began
        self._clear(self._epoch)
        return Note(world, lap["rank"], self._epoch, lap["last"], compute, waiting, began)


@dataclass(frozen=True)
class Evidence:
    """Why a process is slow, or no longer.

    waiting, others_waiting: seconds in a step waited by it, and by the median of the others.
    since: when the first round of those that count began; seconds since 1970.
    """

    world: int
    logical: int
    step: int
    standing: Standing
    waiting: float
    others_waiting: float
    since: float
    slow: bool


class Judge:
    """Compares notes; knows nothing of shepherds and clocks."""

    def __init__(self) -> None:
        self._epoch = -1
        self._fresh: dict[int, Note] = {}
        self._behind: Counter[int] = Counter()
        self._alike: Counter[int] = Counter()
        self._since: dict[int, float] = {}
        #: The last round's median of computing times in a step; None before the first.
        self.others: float | None = None

    def heard(self, note: Note, active: Set[int], epoch: int, slow: Set[int]) -> list[Evidence]:
        """Take a note; if that completes a round, judge.

        Parameters
        ----------
        active: who trains, in ``epoch``.
        slow: whom all know to be slow.

        Returns
        -------
        Whose verdict changes.
        """
        if epoch != self._epoch:
            # After a recovery nothing is as it was.
            self._epoch = epoch
            self._fresh.clear()
            self._behind.clear()
            self._alike.clear()
        if note.epoch != epoch:
            return []
        self._fresh[note.world] = note
        if not active <= self._fresh.keys():
            return []
        notes = {world: self._fresh[world] for world in sorted(active)}
        self._fresh.clear()
        if len(notes) < 2:
            return []
        return self._round(notes, slow)

    def _round(self, notes: Mapping[int, Note], slow: Set[int]) -> list[Evidence]:
        standings = compare({world: note.compute for world, note in notes.items()})
        changed = []
        for world, standing in standings.items():
            self.others = standing.others
            note = notes[world]
            counts, former = self._behind, self._alike
            if standing.alike:
                counts, former = former, counts
            former.pop(world, None)
            if not (standing.far or standing.alike):
                # That proves nothing.
                counts.pop(world, None)
                continue
            counts[world] += 1
            if counts[world] == 1:
                self._since[world] = note.began
            if counts[world] >= _ROUNDS and standing.far != (world in slow):
                others_waiting = median_low(
                    other.waiting for other in notes.values() if other is not note
                )
                changed.append(
                    Evidence(
                        world,
                        note.logical,
                        note.step,
                        standing,
                        note.waiting,
                        others_waiting,
                        self._since[world],
                        standing.far,
                    )
                )
        return changed
