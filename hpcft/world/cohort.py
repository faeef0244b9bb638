"""Stepping with the gradients that come first, as a rank sees it.

Of the ranks that train, a step can do without a few, the backup workers (Chen et al., "Revisiting
distributed synchronous SGD", 2016). Its *cohort* are the ranks whose gradients make it. Nobody can
say who that is but one who sees them come, and no rank can be that one, for it may be the one that
is late: a shepherd settles it (:mod:`hpcft.launch.cohorts`). It goes like this:

* A rank that has its gradients for a step says so, and waits to hear of the step's cohort.
* A rank that then finds itself outside is late. It drops its gradients and waits until it is taken
  in: at the end of the next step one of that step's cohort, the giver, hands it the state. Should
  that step want for gradients, it is not waited for: one that has its own hands on the state that
  the step began with, so that the late rank can make up for others.
* When a rank has completed its last step it says so, and waits until all have; it may have to give
  its state to late ones until then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

#: Seconds between two looks at whether something has failed.
_LOOK = 0.01


@dataclass(frozen=True)
class Cohort:
    """What is settled about a step; ranks are logical ones.

    step: counted from 0: the number of steps completed before it.
    ranks: whose gradients make it; nobody's if that was settled before.
    joining: late ranks that are handed the state as it is after the step.
    giver: by whom.
    over: all ranks have completed their last step.
    """

    step: int
    ranks: tuple[int, ...] = ()
    joining: tuple[int, ...] = ()
    giver: int = -1
    over: bool = False

    @classmethod
    def of(cls, message: dict[str, Any]) -> Cohort:
        """From a message that has its fields, and maybe more."""
        step, giver, over = message["step"], message["giver"], message["over"]
        return cls(step, tuple(message["ranks"]), tuple(message["joining"]), giver, over)

    def gives_now(self, rank: int) -> bool:
        """Whether a rank that waits has to give its state, and nothing else is settled."""
        return self.giver == rank and not self.ranks and not self.over


@dataclass
class Cohorts:
    """One rank's part in it.

    Parameters
    ----------
    send: tells the shepherd something.
    """

    send: Callable[..., None]
    _epoch: int = -1
    _size: int = 0
    _heard: list[Cohort] = field(default_factory=list)
    _condition: threading.Condition = field(default_factory=threading.Condition)

    def begin(self, epoch: int, size: int) -> None:
        """A membership begins, of so many ranks that train."""
        with self._condition:
            self._epoch, self._size = epoch, size
            self._heard.clear()

    def told(self, message: dict[str, Any]) -> None:
        """The shepherd has something that is settled; from the link's thread."""
        with self._condition:
            if message["epoch"] == self._epoch:
                self._heard.append(Cohort.of(message))
                self._condition.notify_all()

    def ready(self, rank: int, step: int, failed: Callable[[], bool]) -> Cohort | None:
        """This rank has its gradients for a step: hear who is of its cohort.

        Parameters
        ----------
        failed: whether it will not be settled, as a rank has failed: then None.

        Returns
        -------
        The cohort of this step; or, without ranks, to whom this one is to give the state that the
        step began with: then :meth:`made` goes on.
        """
        self._say("ready", rank, step)
        return self.made(rank, step, failed)

    def made(self, rank: int, step: int, failed: Callable[[], bool]) -> Cohort | None:
        """Hear who is of a step's cohort, as above."""

        def concerns(cohort: Cohort) -> bool:
            return (cohort.step == step and bool(cohort.ranks)) or cohort.gives_now(rank)

        return self._hear(concerns, failed)

    def taken_in(self, rank: int, failed: Callable[[], bool]) -> Cohort | None:
        """This rank is late: wait until it is to be handed the state; None as above."""
        return self._hear(lambda cohort: rank in cohort.joining, failed)

    def completed(self, rank: int, step: int) -> None:
        """This rank has completed its last step, so many."""
        self._say("completed", rank, step)

    def concluded(self, rank: int, failed: Callable[[], bool]) -> Cohort | None:
        """Then: wait until all ranks have, which is ``over``, or this one is to give its state.

        None as above.
        """

        return self._hear(lambda cohort: cohort.over or cohort.gives_now(rank), failed)

    def _say(self, what: str, rank: int, step: int) -> None:
        self.send(what, epoch=self._epoch, size=self._size, logical=rank, step=step)

    def _hear(self, wanted: Callable[[Cohort], bool], failed: Callable[[], bool]) -> Cohort | None:
        """The first that is wanted; those before it are not needed any more."""
        with self._condition:
            while True:
                for number, cohort in enumerate(self._heard):
                    if wanted(cohort):
                        del self._heard[: number + 1]
                        return cohort
                if failed():
                    return None
                self._condition.wait(_LOOK)
