"""What spares write for the ranks (``--spares-do drain``), as the ranks see it.

Of the saves near the ranks one in each interval is chosen, which a spare is to write to the
directory; rank 0 commits it there. See :mod:`hpcft.ckpt.drain`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import step_of
from hpcft.ckpt.store import Store
from hpcft.train.near import Near
from hpcft.train.rhythm import Report
from hpcft.train.series import Series
from hpcft.world.link import Link


class Drains:
    """One rank's part in it.

    Parameters
    ----------
    store, series: the directory, and the ranks' own saves there.
    near: of whose saves one is chosen.
    link: to the shepherd, which says what a spare has written.
    committed: called, in another thread, when one is.
    """

    def __init__(
        self,
        store: Store,
        series: Series,
        near: Near,
        link: Link,
        report: Report,
        committed: Callable[[], None],
    ) -> None:
        self._store = store
        self._series = series
        self._near = near
        self._link = link
        self._report = report
        self._committed = committed
        #: Of what a spare has written rank 0 is committing.
        self._taking: Errand[None] | None = None
        #: The step of the newest that a spare has written, in rank 0; and of the one that it was
        #: asked for and has not answered yet.
        self._step = self._awaited_step = -1

    def begin(self, first: bool) -> None:
        """The ranks are others: what spares have been asked to write before is nobody's.

        Parameters
        ----------
        first: this is rank 0.
        """
        self._near.drained_step = self._step = self._awaited_step = -1
        self._near.offered.clear()
        self._link.drained.clear()
        if first:
            # What is coming in at this moment is whole: it does not matter which comes first.
            Errand(self._store.sweep_drains)

    def edge(self) -> None:
        """A step is complete, and the saves have been looked after."""
        self._choose()
        self._take_in_one()

    def elsewhere(self, since: int) -> tuple[bool, bool]:
        """As :class:`hpcft.train.series.Hooks` asks."""
        # One that could not be saved near the ranks is not waited for.
        ready = self._awaited_step < 0 or self._near.drained_step < 0
        return self._step >= since, ready

    def wait(self, seconds: float) -> None:
        """Wait until what is being committed is, but not for longer than that."""
        if self._taking:
            with contextlib.suppress(OSError):
                self._taking.result(seconds)

    def finish(self) -> None:
        """Training is over: spares need not go on; said by rank 0."""
        self._link.send("finishing")

    def _choose(self) -> None:
        """Choose the one that a spare is to write; all ranks do alike.

        That is the first of each interval, if the spare has answered for the one before.
        """
        if self._near.drained_step < self._series.since <= self._near.series.begun:
            self._near.drained_step = self._awaited_step = self._near.series.begun

    def _take_in_one(self) -> None:
        """Commit what a spare says it has written, in another thread; in rank 0."""
        if not self._link.drained or (self._taking and not self._taking.done):
            return
        said = self._link.drained.pop(0)
        name = said["checkpoint"]
        if not said["folder"]:
            self._answered(step_of(name))
        elif name in self._near.offered:
            self._near.offered.remove(name)
            if self._series.rhythm:
                self._series.rhythm.meter.spared(said["seconds"])
            self._taking = Errand(lambda: self._take_in(said))

    def _take_in(self, said: dict[str, Any]) -> None:
        folder, step, seconds, spare = (said[n] for n in ("folder", "step", "seconds", "world"))
        why = ""
        try:
            if step > self._series.step:
                checkpoint = self._store.take_in(folder, step)
                self._series.step = self._step = step
                detail = {"path": str(checkpoint.path), "seconds": seconds, "world": spare}
                self._report("checkpoint", step, detail)
                self._committed()
            else:
                self._store.refuse(folder)
                why = f"what spare {spare} has written of step {step} comes too late: the ranks "
                why += f"have saved step {self._series.step} themselves"
        except OSError as error:
            why = f"what spare {spare} has written of step {step} is not committed: {error}"
        finally:
            self._answered(step)
        if why:
            self._report("drain failed", step, {"why": why, "world": spare})

    def _answered(self, step: int) -> None:
        if self._awaited_step == step:
            self._awaited_step = -1
