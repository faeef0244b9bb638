"""Saving a state while training goes on.

In the shared layout all ranks write to one file. In the other each writes a file of its own, and
rank 0 besides the one that says where everything is.

In every rank, at the same step::

    begin       agree on a layout and a directory aside; exchange what others write of this rank's
                shards; hand this rank's parts to the engine
    (copied)    the state may change again
    advance     at later step edges: is everybody's part on disk?  (one small agreement each)
    gather      when it is: rank 0 gets all checksums; the others are through
    (commit)    rank 0, in a thread of its own: metadata and checksums, flush, rename

A save that fails in one rank is dropped by all; what was committed before stays. A file system that
does not answer fails a save as well, where somebody would have to wait for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hpcft.ckpt import device, exchange, filesystem, planning
from hpcft.ckpt._engine import Engine, Transfer
from hpcft.ckpt.collector import paused
from hpcft.ckpt.device import Bytes, Ferry
from hpcft.ckpt.errand import Errand
from hpcft.ckpt.files import OpenFile, flush_directory
from hpcft.ckpt.filesystem import Choice
from hpcft.ckpt.index import OWN
from hpcft.ckpt.plan import Part, Summed
from hpcft.ckpt.planning import Move, Plan, Shape, Unplannable
from hpcft.ckpt.ranks import Ranks
from hpcft.ckpt.spec import Node, Spec
from hpcft.ckpt.store import STATE, Checkpoint, files
from hpcft.ckpt.tree import flatten
from hpcft.errors import HpcftError

T = TypeVar("T")

#: Seconds between two looks at a transfer that is waited for.
_LOOK = 0.2


class Shelf(Protocol):
    """Where checkpoints are kept: :class:`hpcft.ckpt.store.Store`, or one near the ranks."""

    path: Path

    def begin(self, step: int) -> Path:
        """Make a directory for one of ``step``; in rank 0."""

    def join(self, folder: Path, own: str | None) -> None:
        """See in another rank that it is there, and there room for ``own``, a file in it."""

    def commit(
        self, folder: Path, step: int, metrics: Mapping[str, float] | None = None
    ) -> Checkpoint:
        """Its files are written; in rank 0."""


class SaveFailed(HpcftError):
    """A checkpoint could not be written; the ones before it are as they were."""


class Saver:
    """Writes checkpoints of a training.

    Parameters
    ----------
    store: where to.
    ranks: who takes part.
    engine: does the work.
    patience: seconds to wait for a file system that gets nothing done.
    layout: of the files; rank 0's counts.

    Attributes
    ----------
    chosen: in rank 0 the layout of the last save, and why.
    """

    def __init__(
        self,
        store: Shelf,
        ranks: Ranks,
        engine: Engine,
        patience: float = 120.0,
        layout: Choice = "shared",
    ) -> None:
        self.store = store
        self.engine = engine
        self.ranks = ranks
        self.patience = patience
        self.chosen: tuple[filesystem.Layout, str] | None = None
        self._layout = layout
        self._planned: Plan | None = None
        #: The last call to the file system.
        self.errand: Errand[Any] | None = None

    def regroup(self, ranks: Ranks) -> None:
        """Go on with other ranks."""
        self.ranks = ranks
        self._planned = None

    @property
    def hangs(self) -> bool:
        """Whether the file system has not answered the last call yet."""
        return self.errand is not None and not self.errand.done

    def send(self, call: Callable[[], T]) -> T:
        """Call the file system, and wait for it as long as there is patience.

        Raises
        ------
        OSError: it fails, or does not answer.
        """
        self.errand = errand = Errand(call)
        return errand.result(self.patience)

    @paused()
    def begin(
        self,
        step: int,
        tree: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
        committed: Callable[[Checkpoint], None] | None = None,
    ) -> Save:
        """Begin to save; collective.

        Parameters
        ----------
        step: steps completed.
        tree: the state; equal in all ranks, but for the shards in it. It must not change until
            :meth:`Save.wait_copied`.
        metrics: numbers that belong to the step, such as the loss; rank 0's are kept.
        committed: called in rank 0, in another thread, when the checkpoint is committed.

        Raises
        ------
        Unstorable: the state holds something that no checkpoint can.
        SaveFailed: the file cannot be made.
        """
        ranks = self.ranks
        if OWN in tree:
            raise HpcftError(f"a state cannot have a part called {OWN!r}", "choose another")
        structure, leaves = flatten(tree)
        shards = {i: leaf.shard for i, leaf in enumerate(leaves) if leaf.shard is not None}
        planned, folder = self._prepare(step, Shape(structure, [x.spec for x in leaves], shards))
        memories = {leaf: leaves[leaf].memory for leaf in shards}
        sections = exchange.sections(ranks.rank, planned.cut, planned.common, memories)
        exchange.collect(ranks, planned.common, sections, memories)
        pieces: list[tuple[Part, Bytes]] = [
            (part, leaves[part.leaf].memory[part.begin : part.end]) for part in planned.whole
        ]
        pieces += [piece for section in sections.values() for piece in section.pieces]
        return Save(self, planned, step, pieces, folder, dict(metrics or {}), committed)

    def begin_copy(
        self,
        step: int,
        structure: Node,
        specs: Sequence[Spec],
        pieces: Sequence[tuple[Part, Bytes]],
        metrics: Mapping[str, float],
        check: Callable[[Sequence[Summed]], None],
    ) -> Save:
        """Begin to save what is in memory in pieces, without shards; by one process alone.

        Parameters
        ----------
        structure, specs: of the state's leaves.
        pieces: make up all leaves.
        check: told the checksums of the pieces before anything is committed; what it raises fails
            the save.

        Raises
        ------
        SaveFailed: the file cannot be made.
        """
        planned, folder = self._prepare(step, Shape(structure, list(specs), {}))
        return Save(self, planned, step, list(pieces), folder, dict(metrics), check=check)

    def _prepare(self, step: int, shape: Shape) -> tuple[Plan, Path]:
        """A plan and a directory to save to; collective."""
        planned = self._plan(shape)
        aside, why = None, ""
        if self.ranks.rank == 0:
            try:
                aside = self.send(lambda: self._aside(planned, step))
            except OSError as error:
                why = str(error)
        name, why = self.ranks.share((aside and aside.name, why))
        if name is None:
            raise SaveFailed(f"no checkpoint of step {step}: {why}")
        return planned, self.store.path / name

    def _aside(self, planned: Plan, step: int) -> Path:
        aside = self.store.begin(step)
        for stale in files(aside):
            # Of an earlier checkpoint, which more ranks have written.
            if stale.name not in planned.master.files:
                stale.unlink()
        with OpenFile.for_writing(aside / STATE) as file:
            file.resize(planned.master.layout.size)
        return aside

    def _plan(self, shape: Shape) -> Plan:
        known = self._planned
        if self.ranks.least(int(known is not None and known.shape == shape)):
            assert known is not None
            return known
        self._planned = None
        apart = self.ranks.share(self._apart() if self.ranks.rank == 0 else None)
        try:
            self._planned = planning.make(self.ranks, shape, apart)
        except Unplannable as error:
            raise SaveFailed(error.message) from error
        return self._planned

    def _apart(self) -> bool:
        """Whether each rank writes a file of its own."""
        try:
            chosen = self.send(lambda: filesystem.choose(self._layout, self.store.path))
        except OSError as error:
            chosen = "shared", f"its file system cannot be told: {error}"
        self.chosen = chosen
        return chosen[0] == "per-rank"


class Save:
    """A checkpoint on its way; made by :meth:`Saver.begin`.

    Attributes
    ----------
    step: of the state that is saved.
    folder: where it is written.
    over: this rank has no further part in it.
    """

    def __init__(
        self,
        saver: Saver,
        planned: Plan,
        step: int,
        pieces: list[tuple[Part, Bytes]],
        folder: Path,
        metrics: dict[str, float],
        committed: Callable[[Checkpoint], None] | None = None,
        check: Callable[[Sequence[Summed]], None] | None = None,
    ) -> None:
        self.step = step
        self.over = False
        self._saver = saver
        self._planned = planned
        self.folder = folder
        self._metrics = metrics
        self._committed = committed
        self._check = check
        self._errand: Errand[None] | None = None
        self._seen = (-1, time.monotonic())
        self._error: BaseException | None = None
        self._transfer: Transfer | None = None
        names, moves = planned.moves(pieces)
        #: What each of the engine's extents is, None for what is no part of the state.
        self._moved = [move.part for move in moves]
        # Here, in the thread whose work makes the state what it is to be.
        self._ferry = Ferry(saver.engine, [move.memory for move in moves], writing=True)
        self._hand_over(names, moves)

    def _hand_over(self, names: list[str], moves: list[Move]) -> None:
        own = self._planned.own
        extents = [
            (device.for_engine(move.memory), move.file, move.offset, move.length) for move in moves
        ]

        def begin() -> None:
            self._saver.store.join(self.folder, own.name if own else None)
            with ExitStack() as opened:
                targets = [opened.enter_context(self._open(name)) for name in names]
                if not self.over:
                    engine = self._saver.engine
                    self._transfer = engine.write([t.for_engine for t in targets], extents)

        try:
            self._saver.send(begin)
        except OSError as error:
            self._error = error
        if self._ferry.needed and (transfer := self._transfer):
            ferry = self._ferry
            Errand(lambda: ferry.run(transfer))

    def _open(self, name: str) -> OpenFile:
        path = self.folder / name
        if name == STATE:
            return OpenFile.for_writing(path)
        new = not path.exists()
        file = OpenFile.for_writing(path)
        try:
            assert self._planned.own is not None
            file.resize(self._planned.own.layout.size)
            if new:
                # Rank 0 flushes the directory as well; but there are file systems where a node can
                # only flush the names that it has made itself.
                flush_directory(self.folder)
        except OSError:
            file.close()
            raise
        return file

    def wait_copied(self, in_order: bool = False) -> None:
        """Wait until the state may change again.

        With a staging pool that is smaller than this rank's parts that takes some writing; if
        nothing gets written, the save fails in this rank.

        Parameters
        ----------
        in_order: it is enough that what this thread has devices do from now on comes after the
            copying.
        """
        in_order = in_order and self._ferry.needed
        while self._transfer and not self._error:
            try:
                wait = self._ferry.wait_begun if in_order else self._transfer.wait_copied
                if wait(_LOOK):
                    break
                self._see()
            except OSError as error:
                self._error = self._why(error)
                # The engine lets go of the state.
                self._transfer.cancel()
        if in_order:
            self._ferry.lead()

    def _why(self, error: OSError) -> Exception:
        """The cause of a transfer's failure."""
        return self._ferry.error or error

    def _see(self) -> None:
        """See whether the transfer comes further.

        Raises
        ------
        TimeoutError: it has not for too long.
        """
        assert self._transfer is not None
        _, copied, moved, _ = self._transfer.progress()
        now, (before, since) = time.monotonic(), self._seen
        if copied + moved != before:
            self._seen = (copied + moved, now)
        elif now - since > self._saver.patience:
            patience = self._saver.patience
            raise TimeoutError(f"the file system has written nothing for {patience:g} s")

    @property
    def moved(self) -> int:
        """Bytes this rank has written."""
        return self._transfer.progress()[2] if self._transfer else 0

    @property
    def settled(self) -> bool:
        """Whether this rank is through, and, where it commits, has done so or failed."""
        return self.over and (self._errand is None or self._errand.done)

    def drop(self) -> None:
        """Give it up, unless the commit has begun.

        Not collective, and does not wait: for when other ranks have failed.
        """
        if self.over:
            return
        self.over = True
        if self._transfer:
            self._transfer.cancel()
        self._transfer = None

    def advance(self, waiting: bool = False) -> bool:
        """See whether all ranks have written their parts; collective until this rank is through.

        Parameters
        ----------
        waiting: nothing else is being done: a file system that gets nothing written for too long
            fails the save.

        Returns
        -------
        Whether this rank is.

        Raises
        ------
        SaveFailed: some rank could not write; the same in all ranks.
        """
        if self.over:
            return True
        ranks = self._saver.ranks
        status = self._status(waiting)
        worst = ranks.least(status)
        if worst < 0:
            self.drop()
            reasons = ranks.gather(str(self._error) if self._error else "")
            said = "; ".join(dict.fromkeys(r for r in reasons if r)) or "see rank 0's log"
            raise SaveFailed(f"no checkpoint of step {self.step}: {said}")
        if worst == 0:
            return False
        self._gather()
        return True

    def _status(self, waiting: bool) -> int:
        """-1 failed, 0 under way, 1 written."""
        if self._error or self._transfer is None:
            return -1
        try:
            if self._transfer.wait(0):
                return 1
            if waiting:
                self._see()
            else:
                self._seen = (-1, time.monotonic())
            return 0
        except OSError as error:
            self._error = self._why(error)
            return -1

    @paused()
    def _gather(self) -> None:
        assert self._transfer is not None
        sums = self._transfer.checksums()
        own = [Summed(part, s) for part, s in zip(self._moved, sums, strict=True) if part]
        everybodys = self._saver.ranks.gather(own)
        self._transfer = None
        self.over = True
        if self._saver.ranks.rank == 0:
            summed = [one for ranks_own in everybodys for one in ranks_own]
            self._errand = self._saver.errand = Errand(lambda: self._commit(summed))

    def _commit(self, summed: list[Summed]) -> None:
        if self._check:
            self._check(summed)
        extents = self._planned.master.seal(self.step, summed)
        with OpenFile.for_writing(self.folder / STATE) as file:
            self._saver.engine.write([file.for_engine], extents).wait()
        checkpoint = self._saver.store.commit(self.folder, self.step, self._metrics)
        if self._committed:
            self._committed(checkpoint)

    def finish(self) -> None:
        """Wait for the commit, in the rank that makes it, once :meth:`advance` says through.

        Raises
        ------
        SaveFailed: it failed.
        """
        try:
            if self._errand:
                self._errand.result(self._saver.patience)
        except Exception as error:
            raise SaveFailed(f"no checkpoint of step {self.step}: {error}") from error
