"""Checkpoints near the ranks, in memory or on the node's disk, as training goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore, Tier, step_of
from hpcft.ckpt.policy import Policy
from hpcft.ckpt.ranks import Alone, Ranks
from hpcft.ckpt.save import Save, SaveFailed, Saver
from hpcft.ckpt.store import METRICS, STATE, shard
from hpcft.train.rhythm import Past, Report, Rhythm
from hpcft.train.series import NICENESS, After, Hooks, Series, nothing
from hpcft.world.link import Link


class Near:
    """The checkpoints of one tier near the ranks.

    Parameters
    ----------
    number: of the tier, as the shepherds count them.
    link: to the shepherd, which has copies made on another node; None if there is none.
    past: what has been so far.
    beginning: called when a save begins.
    lacking: called in all ranks, when a save begins, with its step, if copies of the last are not
        on other nodes for the first time.

    Attributes
    ----------
    drained_step: of the one that a spare is to write to the directory; -1 for none.
    offered: in rank 0 the names of those that were, by the present ranks.
    """

    def __init__(
        self,
        number: int,
        tier: Tier,
        policy: Policy,
        link: Link | None,
        report: Report,
        waiting: Callable[[], AbstractContextManager[None]],
        past: Past,
        beginning: Callable[[], None],
        lacking: Callable[[int], None],
    ) -> None:
        self._about_to_begin = beginning
        self._lacking = lacking
        self.store = NearStore(Path(tier.path))
        self._number = number
        self._link = link
        self._report = report
        #: The name of the last that was written, and of the last that other nodes have as well.
        self._last = self._safe = ""
        self._told = self._failing = False
        #: Whether the last save was begun without copies of the one before; alike in all ranks.
        self._lacked = False
        self.drained_step = -1
        self.offered: set[str] = set()
        # An engine of its own, for that of the parallel file system may be draining for minutes.
        engine = Engine(policy.memory, niceness=NICENESS)
        self._saver = Saver(self.store, Alone(), engine, policy.timeout, "per-rank")
        hooks = Hooks(
            nothing, self._written, self._failed, nothing, waiting, self._after, self._beginning
        )
        #: In the history.
        self.name = f"near {number}"
        rhythm = Rhythm.of(self.name, tier, past, report)
        self.series = Series(self._saver, tier.every, tier.timed, policy.overlap, hooks, rhythm)

    def attach(self, ranks: Ranks, step: int) -> None:
        """Save with these ranks from now on, which begin at ``step``."""
        self._lacked = False
        # Some copies may have gone with a node.
        self.series.attach(ranks, step, soon=True)

    def _written(self, save: Save) -> None:
        """Have copies made of what this rank has written."""
        # In a thread, for the kernel takes its time to free gigabytes.
        Errand(lambda: self.store.clear(save.folder))
        self._last, self._failing = save.folder.name, False
        rank = self._saver.ranks.rank
        # The last says that all is there.
        own = [shard(rank)] if rank else [METRICS, shard(rank), STATE]
        files = [name for name in own if (save.folder / name).exists()]
        drained = save.step == self.drained_step
        if drained and rank == 0:
            self.offered.add(self._last)
        if self._link:
            self._link.send(
                "copy", tier=self._number, checkpoint=self._last, files=files, drained=drained
            )

    def _after(self) -> After:
        if not (self._last and self._link):
            return After.THROUGH
        why = self._link.copied.get(self._last)
        if why is None:
            return After.UNDER_WAY
        if why and not self._told:
            self._told = True
            self._report("copies failed", step_of(self._last), {"why": why})
        return After.LACKING if why else After.THROUGH

    def _beginning(self, step: int, through: bool) -> None:
        self._about_to_begin()
        if not (through or self._lacked):
            self._lacking(step)
        self._lacked = not through
        if through:
            self._safe = self._last or self._safe
        # One that lacks copies is no reason to remove the one before; who is new knows of none.
        ranks = self._saver.ranks
        known = ranks.share(ranks.gather((self._last, self._safe)))
        self.store.kept = frozenset(chain.from_iterable(known))

    def await_copies(self) -> None:
        """Wait until another save can begin."""
        while self._after() is After.UNDER_WAY:
            time.sleep(0.001)

    def restored(self, name: str) -> None:
        """Training goes on from one so called."""
        self._safe = name

    def _failed(self, step: int, error: SaveFailed) -> None:
        if step == self.drained_step:
            # Another can be chosen.
            self.drained_step = -1
        # Every few steps the same would drown everything else, such as that memory is too small.
        if self._saver.ranks.rank == 0 and not self._failing:
            self._report("save failed", step, {"why": error.message})
        self._failing = True
