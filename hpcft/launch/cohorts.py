"""Settling which gradients make a step, by the rules in :mod:`hpcft.world.cohort`.

One shepherd does that for all, see :meth:`hpcft.launch.fleet.Fleet.settler`. Shepherds compute
nothing, so it answers at once, however slow the ranks are.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict

from hpcft.launch.channel import Message
from hpcft.world.cohort import Cohort

#: When there are enough gradients for a step, it waits a little for those who may be about to come:
#: this part of what a step has taken lately. Else a rank that is always a little slower than the
#: others would work for nothing in every second step.
_PATIENCE = 0.05
#: When there are too few, and late ranks that could make up for others, it waits longer: should
#: those others come, the late ones had better be idle, so that they are not late again.
_LONG_PATIENCE = 0.5
#: By how many steps that is measured.
_LATELY = 9


class Settling:
    """What is settled of the steps of one membership: pure logic.

    Parameters
    ----------
    size: how many ranks train.
    backup: how many gradients a step can do without; with as few ranks as that, all but one.
    """

    def __init__(self, size: int, backup: int) -> None:
        self._size = size
        self._enough = max(1, size - backup)
        self._begin()

    def _begin(self) -> None:
        #: The step that is settled next; None before the first gradients.
        self._step: int | None = None
        #: Who may come in time for it.
        self._present = set(range(self._size))
        self._ready: set[int] = set()
        #: Who has been late, and waits to be taken in.
        self._late: set[int] = set()
        self._completed: set[int] = set()

    @property
    def enough(self) -> bool:
        """Whether there are enough gradients for the step, though more may come."""
        return len(self._ready) >= self._enough

    @property
    def wanting(self) -> bool:
        """Whether there are not, and late ranks could make up for others."""
        return not self.enough and bool(self._ready and self._late)

    def ready(self, rank: int, step: int) -> list[Cohort]:
        """A rank has its gradients; returns what is settled by that."""
        if self._step is None or step > self._step:
            # Steps without gradients need no cohort.
            self._step = step
            self._ready.clear()
        if step < self._step:
            self._late.add(rank)
            return self._serve()
        self._ready.add(rank)
        return self.settle() if self.enough and self._ready >= self._present else []

    def settle(self) -> list[Cohort]:
        """Those that have come make the step."""
        assert self._step is not None
        ranks = tuple(sorted(self._ready))
        # Each in turn, as it costs the giver time.
        giver = ranks[self._step % len(ranks)]
        cohort = Cohort(self._step, ranks, tuple(sorted(self._late)), giver)
        self._present = self._ready | self._late
        self._ready, self._late = set(), set()
        self._step += 1
        return [cohort]

    def recruit(self) -> list[Cohort]:
        """Late ranks are handed the state that the step began with, to have gradients for it."""
        return self._hand_over(min(self._ready))

    def completed(self, rank: int, step: int) -> list[Cohort]:
        """A rank has done all its steps; returns what is settled by that."""
        self._step = step
        self._completed.add(rank)
        if len(self._completed) < self._size:
            return self._serve()
        self._begin()
        return [Cohort(step - 1, over=True)]

    def _serve(self) -> list[Cohort]:
        """Late ranks are taken in by those that have done all their steps, if there are such."""
        done = bool(self._completed and self._late)
        return self._hand_over(min(self._completed)) if done else []

    def _hand_over(self, giver: int) -> list[Cohort]:
        """Somebody who waits gives the state as it is before the next step."""
        assert self._step is not None
        joining = tuple(sorted(self._late))
        self._present |= self._late
        self._late = set()
        return [Cohort(self._step - 1, (), joining, giver)]


class Cohorts:
    """A shepherd's part in it, if it is the one that settles.

    Parameters
    ----------
    backup: how many gradients a step can do without.
    proclaim: lets all shepherds know.
    """

    def __init__(self, backup: int, proclaim: Callable[..., None]) -> None:
        self._backup = backup
        self._proclaim = proclaim
        self._epoch = -1
        self._took: deque[float] = deque(maxlen=_LATELY)
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def heard(self, note: Message) -> None:
        """A rank has its gradients for a step, or has done all its steps."""
        if note["epoch"] < self._epoch:
            return
        if note["epoch"] > self._epoch:
            self._epoch, self._settling = note["epoch"], Settling(note["size"], self._backup)
            self._took.clear()
            self._stop_waiting()
        rank, step = note["logical"], note["step"]
        if note["kind"] == "completed":
            self._settled(self._settling.completed(rank, step))
            return
        self._settled(self._settling.ready(rank, step))
        if self._settling.enough:
            self._wait(_PATIENCE)
        elif self._settling.wanting:
            self._wait(_LONG_PATIENCE)

    def _wait(self, patience: float) -> None:
        """For others that may be about to come."""
        typical = statistics.median(self._took) if self._took else 0.0
        end = asyncio.get_running_loop().time() + patience * typical
        if self._timer and self._timer.when() <= end:
            return
        self._stop_waiting()
        self._timer = asyncio.get_running_loop().call_at(end, self._patience_over)

    def _patience_over(self) -> None:
        self._timer = None
        if self._settling.enough:
            self._settled(self._settling.settle())
        elif self._settling.wanting:
            self._settled(self._settling.recruit())

    def _stop_waiting(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _settled(self, cohorts: list[Cohort]) -> None:
        for cohort in cohorts:
            if cohort.ranks:
                self._stop_waiting()
                now = time.monotonic()
                if self._last:
                    self._took.append(now - self._last)
                self._last = now
            self._proclaim(kind="cohort", epoch=self._epoch, **asdict(cohort))
