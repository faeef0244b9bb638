"""The checkpoints of one tier as training goes on: when the next begins, how far one has come."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Ranks
from hpcft.ckpt.save import Save, SaveFailed, Saver
from hpcft.ckpt.store import Checkpoint
from hpcft.train.rhythm import Rhythm
from hpcft.train.state import State

#: Of what moves the bytes: only what training leaves of the processors; a disk is slower than that
#: almost always.
NICENESS = 19
#: A step to which nobody comes.
NEVER = 1 << 62
#: Steps by which the time of a step is measured.
_MEASURED_STEPS = 5

#: What keeps a save from beginning, the worst first; the last two do not.
_HINDRANCES = ("the file system does not answer", "the one before is still under way", "", "")
_HANGS, _UNDER_WAY, _LACKING, _NONE = range(4)


class After(enum.Enum):
    """What has become of the last checkpoint, in this rank, after it was written.

    UNDER_WAY: something is still being done with it.
    LACKING: not all has been done that should have been.
    THROUGH: all has.
    """

    UNDER_WAY = _UNDER_WAY
    LACKING = _LACKING
    THROUGH = _NONE


def nothing(*_: object) -> None:
    """What many hooks do."""


@dataclass(frozen=True)
class Hooks:
    """What a series tells, and asks.

    committed: a checkpoint is, after so many seconds; in rank 0, in a thread.
    written: a checkpoint is, and this rank has no part in it any more; in every rank.
    failed: one of this step could not be written.
    skipped: one of this step was not begun, and why; in every rank.
    waiting: is entered around what may wait for other ranks.
    after: what has become of the last one that was written.
    beginning: another is begun, of which step, and whether all ranks were through with the last.
    elsewhere: whether somebody else has made one of this step or a later one, so that the ranks
        are spared what is due; and whether the next can be asked for. Rank 0 says. None: there is
        nobody else.
    """

    committed: Callable[[Checkpoint, float], None]
    written: Callable[[Save], None]
    failed: Callable[[int, SaveFailed], None]
    skipped: Callable[[int, str], None]
    waiting: Callable[[], AbstractContextManager[None]]
    after: Callable[[], After] = lambda: After.THROUGH
    beginning: Callable[[int, bool], None] = lambda step, through: None
    elsewhere: Callable[[int], tuple[bool, bool]] | None = None


class Series:
    """One tier's saves, one after the other.

    Parameters
    ----------
    saver: makes them.
    every: steps, or seconds if ``timed``, between them.
    overlap: copy the state while the next step's forward and backward pass run.
    rhythm: says the seconds between them in place of ``every``; None if they stay the same.

    Attributes
    ----------
    step: of the newest that is known here to be committed; -1 for none.
    begun: of the newest that was begun since the ranks are these, and has not failed; -1 for none.
    since: from which step on a checkpoint that somebody else makes spares the ranks the next that
        is due; :data:`NEVER` if none is asked for.
    """

    def __init__(
        self,
        saver: Saver,
        every: float,
        timed: bool,
        overlap: bool,
        hooks: Hooks,
        rhythm: Rhythm | None = None,
    ) -> None:
        self.step = self.begun = self.since = -1
        self._saver = saver
        self._every = every
        self._timed = timed
        self._overlap = overlap
        self._hooks = hooks
        self.rhythm = rhythm
        self._save: Save | None = None
        self._measured_from = (0, 0.0)
        self._next: int | None = None
        #: The last step at whose edge this rank has been.
        self._seen = 0
        self._metrics: dict[str, float] = {}
        #: The script has asked for a save that is not through yet.
        self._asked = False
        self._through = False
        #: Nobody has compared that since the ranks are others.
        self._regrouped = False

    @property
    def engine(self) -> Engine:
        """What moves the bytes."""
        return self._saver.engine

    @property
    def _ranks(self) -> Ranks:
        return self._saver.ranks

    def attach(self, ranks: Ranks, step: int, soon: bool) -> None:
        """Save with these ranks from now on, which begin at ``step``.

        Parameters
        ----------
        soon: begin with the next step.
        """
        self.drop()
        self._saver.regroup(ranks)
        self._regrouped = True
        self._measured_from = (step, time.monotonic())
        self._next = step + 1 if soon else None
        self._seen = step
        self.begun, self.since = -1, step + 1
        if self.rhythm:
            self.rhythm.meter.restart()

    def drop(self) -> None:
        """Give up a checkpoint that is not yet on its way into the store."""
        if self._save:
            self._save.drop()
        if self._save and self._save.settled:
            self._save = None

    def wait_copied(self) -> None:
        """Wait until the state may be changed by what this thread does next."""
        if self._save:
            began = time.monotonic()
            self._save.wait_copied(in_order=True)
            if self.rhythm:
                self.rhythm.meter.copied(time.monotonic() - began)

    def edge(self, state: State, metrics: Mapping[str, float]) -> None:
        """A step is complete, in all ranks: look after the save under way, begin one if it is time.

        Parameters
        ----------
        metrics: of this step, as the script gives them.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        began, before = time.monotonic(), self._save
        self._metrics = dict(metrics)
        with self._hooks.waiting():
            try:
                if self._save and not self._save.over and self._save.advance():
                    self._asked = False
            except SaveFailed as error:
                self._failed(state.step, error)
            # Also if the one before has failed just now: a step that was due does not come again.
            due = self._due(state.step) and not self._spared(state.step)
            try:
                if (self._asked_anew() or due) and self._free(state.step):
                    self._begin(state, self._overlap)
            except SaveFailed as error:
                self._failed(state.step, error)
        self._collect()
        if self.rhythm:
            self.rhythm.meter.edge(began, before, self._save)

    def expect(self, step: int) -> None:
        """One is due at the edge of this step, whatever was planned; to be called in all ranks."""
        self._next = step

    def save(self, state: State, overlap: bool) -> None:
        """The script asks for a save; collective, between two steps.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        self.wait()
        self._asked = True
        try:
            with self._hooks.waiting():
                self._begin(state, overlap)
        except SaveFailed as error:
            self._failed(state.step, error)
        if self.rhythm:
            self.rhythm.meter.restart()

    def finish(self, state: State) -> None:
        """Save where training has come to, and wait until all is committed; collective.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        self.wait()
        with self._hooks.waiting():
            if self._ranks.share(self.step != state.step):
                try:
                    if why := self._hindrance():
                        raise SaveFailed(f"no checkpoint of step {state.step}: {why}")
                    self._begin(state, overlap=False)
                except SaveFailed as error:
                    self._failed(state.step, error)
        self.wait()

    def wait(self) -> None:
        """Wait until the save under way is through.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        try:
            while self._save and not self._advance():
                time.sleep(0.001)
            self._asked = False
            if self._save:
                self._save.finish()
                self._hooks.written(self._save)
        except SaveFailed as error:
            self._failed(self._save.step if self._save else -1, error)
        self._save = None

    def _advance(self) -> bool:
        # Left again each time, for it is the disk that is waited for, and not the others.
        with self._hooks.waiting():
            assert self._save is not None
            return self._save.advance(waiting=True)

    def _collect(self) -> None:
        """Be through with a save that is committed, or could not be, where this rank commits."""
        if self._save and self._save.settled:
            save, self._save = self._save, None
            try:
                save.finish()
            except SaveFailed as error:
                self._failed(save.step, error)
            else:
                self._hooks.written(save)

    def _failed(self, step: int, error: SaveFailed) -> None:
        self._save = None
        self._asked = False
        self.begun = -1
        if self.rhythm:
            self.rhythm.meter.restart()
        self._hooks.failed(step, error)

    def _asked_anew(self) -> bool:
        """Whether the ranks have changed before a save was through that the script has asked for.

        The new ranks know nothing of it.
        """
        if not self._regrouped:
            return False
        self._regrouped = False
        return self._ranks.least(-int(self._asked)) < 0

    def _due(self, step: int) -> bool:
        # A rank that was late has not been at every step.
        seen, self._seen = self._seen, step
        if self._next is not None and step >= self._next:
            self._next = None
            return True
        if not self._timed:
            return step // int(self._every) > seen // int(self._every)
        since, began = self._measured_from
        if self._next is None and step >= since + _MEASURED_STEPS:
            self._schedule(step, (time.monotonic() - began) / (step - since))
        return False

    def _spared(self, step: int) -> bool:
        """Whether one is due that somebody else has made."""
        if self._hooks.elsewhere is None:
            return False
        found = self._hooks.elsewhere(self.since) if self._ranks.rank == 0 else None
        spared, ready = self._ranks.share(found)
        # What the ranks save now, they need not have saved for them as well.
        first = step if spared else step + 1
        self.since = first if ready else NEVER
        if spared and self._timed:
            self._schedule_next(step)
        return bool(spared)

    def _schedule_next(self, step: int) -> None:
        since, began = self._measured_from
        self._schedule(step, (time.monotonic() - began) / max(1, step - since))

    def _schedule(self, step: int, seconds: float) -> None:
        every = self._every
        if self.rhythm and self._ranks.rank == 0:
            every = self.rhythm.every(step)
        self._next = step + self._ranks.share(max(1, round(every / max(seconds, 1e-9))))
        self._measured_from = (step, time.monotonic())

    def _free(self, step: int) -> bool:
        """Whether a save can begin; if not, that is said."""
        why = self._hindrance()
        if why:
            # What a save takes is not known before the first is through.
            if not (self.rhythm and self._save):
                self._hooks.skipped(step, why)
            if self._timed:
                self._next = step + 1
        return not why

    def _hindrance(self) -> str:
        """Why no save can begin, in some rank; nothing if the one before is through in all."""
        self._collect()
        number = self._hooks.after().value
        if self._save:
            number = _UNDER_WAY
        elif self._saver.hangs:
            number = _HANGS
        least = self._ranks.least(number)
        self._through = least == _NONE
        return _HINDRANCES[least]

    def _begin(self, state: State, overlap: bool) -> None:
        if self._timed:
            self._schedule_next(state.step)
        self._hooks.beginning(state.step, self._through)
        began = time.monotonic()
        content = state.to_tree(frozen=overlap)

        def committed(checkpoint: Checkpoint) -> None:
            self.step = checkpoint.step
            self._hooks.committed(checkpoint, time.monotonic() - began)

        self._save = self._saver.begin(state.step, content, self._metrics, committed)
        self.begun = state.step
        if not overlap:
            self._save.wait_copied()
