"""Leaving a training in order, at a step that all ranks leave at.

Slurm, or a person, has asked for the end; or all ranks are to leave so that others can be launched
with them. All ranks are to save the same step, and nothing is to be
exchanged in the steps before that for it. So the shepherds, who talk to each other anyway, settle
the step, by two rules:

* Who is asked says how far it is, and from then on waits at the end of its next step until it hears
  up to which step to go.
* That is one more than the furthest has said.

A rank that has ended step k without waiting had not been asked before, and so says k or more:
nobody is beyond the step that is settled. The answers come from threads, also of ranks that wait
for others in a collective: so nobody waits for long, and not for each other. A failure meanwhile
leads to a new membership, which settles a step of its own.

In the same way is settled at which step slow ranks change places with spares; but that is for one
membership only, and nobody leaves: all come to the next membership as after a failure
(:mod:`hpcft.world.recovery`), in which those that are to step down say so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

from hpcft.world.progress import Progress

#: What all are to leave for: the end of the run, or a launch with more ranks or fewer. The facts by
#: which the shepherds let each other know are called so, too.
LEAVE, RESIZE = "leave", "resize"
#: And what all pause for at the end of a step: that slow ranks change places with spares.
REPLACE = "replace"
#: The fact that the second has come to nothing.
STAYS = "stays"
#: Seconds between two looks at whether something has failed.
_LOOK = 0.01


def replacing(epoch: int) -> str:
    """The fact that in the membership of this epoch slow ranks are to step down."""
    return f"{REPLACE} {epoch}"


class Departure:
    """One rank's part in it.

    Parameters
    ----------
    progress: has the step this rank has completed.
    send: tells the shepherd that this rank is at a step of a membership's epoch; at -1 if it does
        not train yet.

    Attributes
    ----------
    asked: whether all are to leave.
    reason: why, in words.
    durable: whether what is saved is to outlast the nodes.
    """

    def __init__(self, progress: Progress, send: Callable[[int, int], None]) -> None:
        self.asked = False
        self.reason = ""
        self.durable = True
        self._progress = progress
        self._send = send
        #: The epoch this rank trains in; None while it does not.
        self._epoch: int | None = None
        self._waits = False
        self._condition = threading.Condition()
        #: epoch -> the step at whose end all leave
        self._until: dict[int, int] = {}

    def ask(self, reason: str, durable: bool = True) -> None:
        """All are to leave; from the link's thread."""
        self.reason, self.durable = reason, durable
        # First this, then the step is read; at a step's end the other way round.
        self.asked = True
        if not self._waits:
            self._answer()

    def forget(self) -> None:
        """It has come to nothing; in this epoch there is no other."""
        self.asked = False

    def settled(self, epoch: int, step: int) -> None:
        """All ranks have said how far they are; from the link's thread."""
        with self._condition:
            self._until[epoch] = step
            self._condition.notify_all()

    def begin(self, epoch: int) -> None:
        """This rank trains, in a membership of this epoch."""
        self._epoch, self._waits = epoch, False
        if self.asked:
            self._answer()

    def wait(self) -> None:
        """This rank does not train, but may later: there is nothing to ask it now."""
        self._epoch, self._waits = None, True

    def pause(self) -> None:
        """This rank is setting up, and has nothing to save."""
        self._epoch, self._waits = None, False

    def over(self, step: int, failed: Callable[[], bool]) -> bool:
        """Whether all leave now, at the end of this step; waits until that is known.

        Parameters
        ----------
        failed: whether it will not be known, as a rank has failed: then False.
        """
        assert self._epoch is not None
        with self._condition:
            while self._epoch not in self._until:
                if failed():
                    return False
                self._condition.wait(_LOOK)
            return step >= self._until[self._epoch]

    def _answer(self) -> None:
        epoch = self._epoch
        self._send(*((epoch, self._progress.completed) if epoch is not None else (0, -1)))


class Replacement(Departure):
    """One rank's part in a replacement.

    Attributes
    ----------
    worlds: world ranks that are to step down.
    """

    def __init__(self, progress: Progress, send: Callable[[int, int], None]) -> None:
        super().__init__(progress, send)
        self.worlds: frozenset[int] = frozenset()
        #: The epoch it is for.
        self._wanted = -1

    def want(self, epoch: int, worlds: frozenset[int]) -> None:
        """These are to step down, in this epoch; from the link's thread."""
        with self._condition:
            self._wanted, self.worlds = epoch, worlds
            self.ask("")

    def begin(self, epoch: int) -> None:
        with self._condition:
            if self._wanted != epoch:
                # That was another membership's.
                self.forget()
            super().begin(epoch)


class Departures:
    """One rank's part in all of them.

    Parameters
    ----------
    progress: has the step this rank has completed.
    send: as :class:`Departure` takes it, but that what is left for comes first.

    Attributes
    ----------
    end: for the end of the run.
    resize: for a launch with more ranks or fewer.
    replacement: for slow ranks to change places with spares.
    """

    def __init__(self, progress: Progress, send: Callable[[str, int, int], None]) -> None:
        self.end = Departure(progress, partial(send, LEAVE))
        self.resize = Departure(progress, partial(send, RESIZE))
        self.replacement = Replacement(progress, partial(send, REPLACE))
        self._by_purpose: dict[str, Departure] = {
            LEAVE: self.end,
            RESIZE: self.resize,
            REPLACE: self.replacement,
        }

    def of(self, purpose: str) -> Departure:
        """The one for this purpose."""
        return self._by_purpose[purpose]

    def asked(self) -> Iterator[Departure]:
        """Those that all were asked for, the end of the run first."""
        return (departure for departure in (self.end, self.resize) if departure.asked)

    def begin(self, epoch: int) -> None:
        """This rank trains, in a membership of this epoch."""
        for departure in self._by_purpose.values():
            departure.begin(epoch)

    def wait(self) -> None:
        """This rank does not train, but may later: there is nothing to ask it now."""
        for departure in self._by_purpose.values():
            departure.wait()

    def pause(self) -> None:
        """This rank is setting up, and has nothing to save."""
        for departure in self._by_purpose.values():
            departure.pause()
