"""Checkpoints of a running job, near the ranks and on the parallel file system."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpi4py import MPI

from hpcft.ckpt import device, scattered, tree
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.errand import Errand
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.lock import Lock, Standing
from hpcft.ckpt.policy import Policy
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import SaveFailed, Saver
from hpcft.ckpt.scattered import Scattered
from hpcft.ckpt.store import Checkpoint, Store
from hpcft.errors import HpcftError
from hpcft.train.comm_ranks import CommRanks
from hpcft.train.drains import Drains
from hpcft.train.near import Near
from hpcft.train.rhythm import FILES, Past, Report, Rhythm
from hpcft.train.series import NICENESS, Hooks, Series, nothing
from hpcft.train.state import State
from hpcft.world.link import Link


class Checkpoints:
    """Saves a training's state as it goes, and restores it.

    Parameters
    ----------
    policy: what the user wants.
    lock: of the directory; rank 0 has it.
    report: told, in rank 0, what has happened: kind, step, detail; also from another thread.
    waiting: is entered around what may wait for other ranks.
    link: to the shepherd, if there is one.
    nodes: how many train.
    drained: spares write checkpoints for the ranks.

    Attributes
    ----------
    newest: the step of the newest checkpoint when training ended; -1 for none.
    beginning: called in all ranks that save when a save begins, to have the state as it is to be.
    """

    def __init__(
        self,
        policy: Policy,
        lock: Lock,
        report: Report,
        waiting: Callable[[], AbstractContextManager[None]],
        link: Link | None,
        nodes: Callable[[], int] = lambda: 1,
        drained: bool = False,
    ) -> None:
        self._policy = policy
        self._lock = lock
        self._report = report
        self._link = link
        self._store = Store(Path(policy.directory), lock)
        engine = Engine(policy.memory, bandwidth=policy.bandwidth, niceness=NICENESS)
        self._saver = Saver(self._store, Alone(), engine, policy.timeout, policy.layout)
        self.beginning: Callable[[], None] = nothing
        hooks = Hooks(
            self._committed,
            nothing,
            self._failed,
            self._skipped,
            waiting,
            beginning=lambda step, through: self.beginning(),
            elsewhere=self._elsewhere if drained else None,
        )
        self._past = Past(self._store.path, nodes)
        rhythm = Rhythm.of(FILES, policy, self._past, report)
        self._series = Series(
            self._saver, policy.every, policy.timed, policy.overlap, hooks, rhythm
        )
        self._near = [
            Near(
                number,
                tier,
                policy,
                link,
                report,
                waiting,
                self._past,
                beginning=lambda: self.beginning(),
                # What the nodes do not keep for each other is soon in the directory.
                lacking=self._series.expect,
            )
            for number, tier in enumerate(policy.near)
        ]
        self._drains: Drains | None = None
        if drained and link:
            near = self._near[0]
            self._drains = Drains(self._store, self._series, near, link, report, self._retain)
        self._layout: tuple[str, str] | None = None
        self._everybody: CommRanks | None = None
        #: Whether this rank has a part in saving, and whether it saves without the others.
        self._saves, self._alone = True, False
        self.newest = -1

    @property
    def _all(self) -> list[Series]:
        """The nearest first, for it is the fastest."""
        return [*(near.series for near in self._near), self._series]

    @property
    def _adapts(self) -> bool:
        """Whether some tier's interval is found out in the run."""
        return any(series.rhythm for series in self._all)

    # -- the lock ------------------------------------------------------------------------------

    def _have_lock(self, comm: MPI.Intracomm) -> None:
        """Have the directory for this run, waiting for another that still uses it; in rank 0.

        Raises
        ------
        UsageError: another run does not end.
        MPI.Exception: a rank has failed.
        """
        standing = self._lock.wait(self._policy.timeout, self._occupied, lambda: comm.Iprobe())
        if standing is Standing.NONE:
            detail = {"why": f"{self._store.path} cannot be locked: {self._lock.why}"}
            self._report("unlocked", 0, detail)

    def _occupied(self, why: str) -> None:
        self._report("occupied", 0, {"why": why})

    def take_over(self) -> None:
        """This process plays rank 0, now if not before: have the lock, when that is free."""
        self._lock.pursue(self._policy.timeout, self._occupied)

    def hand_on(self) -> None:
        """This process plays rank 0 no longer: let who does have the directory.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        self.settle()
        self.close()

    def close(self) -> None:
        """Training is over here: let others have the directory."""
        if self._saver.hangs:
            # What hangs may yet write. The lock ends with the process.
            return
        with contextlib.suppress(OSError):
            self._saver.send(self._lock.release)

    # -- restoring -----------------------------------------------------------------------------

    def restore(self, state: State, comm: MPI.Intracomm) -> str | None:
        """Bring ``state`` to where the newest good checkpoint is; collective.

        That is in all ranks if the state is sharded, else in rank 0. Of those of the same step the
        nearest is taken.

        Returns
        -------
        Where it was; None if there is none.

        Raises
        ------
        HpcftError: there are checkpoints and none is good, or it does not fit the state; or
            another run uses the directory, or it cannot be made.
        MPI.Exception: a rank has failed.
        """
        ranks = CommRanks(comm)
        if ranks.rank == 0:
            Errand(self._store.create).result()
            self._have_lock(comm)
        sources = self._sources(ranks)
        # Nobody trains meanwhile, but the other ranks may spin: not with the niceness of saves.
        engine = Engine(self._policy.memory)
        for source in sources:
            try:
                step, content = self._read(source, engine, ranks, state)
            except (Damaged, OSError) as error:
                if ranks.rank == 0:
                    self._report("damaged", source.step, {"why": str(error), "path": source.where})
                continue
            if state.sharded() or ranks.rank == 0:
                self._install(source, state, step, content)
            for near in self._near:
                near.store.forget(step)
            if isinstance(source.found, Scattered):
                assert source.near is not None
                source.near.restored(source.found.name)
            else:
                self._series.step = step
            if ranks.rank == 0:
                self._past.restored(source.near.name if source.near else FILES)
                self._report("restore", step, {"path": source.where})
            return source.where
        if count := sum(source.near is None for source in sources):
            raise HpcftError(
                f"none of the {count} checkpoints in {self._store.path} is good",
                "see events.jsonl for what is wrong with each",
            )
        # What was near the ranks went with nodes before anything was committed.
        for near in self._near:
            near.store.forget(-1)
        self._past.restored(FILES)
        return None

    def _sources(self, ranks: CommRanks) -> list[_Source]:
        """The checkpoints there are, the best first; collective."""
        committed: list[Checkpoint] = []
        has_near = False
        if ranks.rank == 0:
            try:
                # In a thread: a file system that hangs keeps the process from ending otherwise.
                committed, has_near = Errand(self._committed_ones).result()
            except OSError as error:
                raise HpcftError(
                    f"the checkpoints in {self._store.path} cannot be looked through: {error}",
                    "see that its file system is there, on all nodes",
                ) from error
        committed, has_near = ranks.share((committed, has_near))
        sources = [_Source(one.step, str(one.path), one) for one in committed]
        for near in self._near if has_near else ():
            for one in scattered.find(ranks, near.store):
                where = f"{near.store.path / one.name} on the nodes"
                sources.append(_Source(one.step, where, one, near))
        return sorted(sources, key=lambda source: (-source.step, source.near is None))

    def _committed_ones(self) -> tuple[list[Checkpoint], bool]:
        self._store.sweep(keep=1)
        if self._adapts:
            self._past.read()
        return self._store.committed(), self._store.has_near

    def _read(
        self, source: _Source, engine: Engine, ranks: CommRanks, state: State
    ) -> tuple[int, dict[str, Any]]:
        """One checkpoint's step and content; collective.

        Raises
        ------
        Damaged, OSError: it is not good; some error of these in all ranks.
        """
        sharded = state.sharded()
        wanted = sharded or ranks.rank == 0
        found = source.found
        if isinstance(found, Scattered):
            assert source.near is not None

            def report(why: str) -> None:
                if ranks.rank == 0:
                    detail = {"why": why, "path": source.where, "copies": True}
                    self._report("damaged", source.step, detail)

            return scattered.load(
                found, source.near.store, engine, ranks, state.targets(), wanted, report
            )
        if sharded:
            return load(found.state, engine, ranks, state.targets())
        step, why = found.step, ""
        content: dict[str, Any] = {}
        if wanted:
            # In a thread, as above; what is collective cannot be, as all that uses MPI.
            try:
                step, content = Errand(
                    lambda: load(found.state, engine, target=state.targets())
                ).result()
            except (Damaged, OSError) as error:
                why = str(error)
        if why := ranks.share(why):
            raise Damaged(why)
        return step, content

    def _install(self, source: _Source, state: State, step: int, content: dict[str, Any]) -> None:
        try:
            state.from_tree(step, content)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise HpcftError(
                f"the checkpoint {source.where} does not fit this training: {error}",
                "start with the model it was made with, or with another --ckpt-dir",
            ) from error

    # -- saving --------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """See early that the state can be saved, and prepare for it what takes its time.

        Raises
        ------
        Unstorable: there is something in it that a checkpoint cannot hold.
        """
        _, leaves = tree.flatten(state.to_tree(frozen=False))
        for place in {leaf.memory.device for leaf in leaves if device.on_device(leaf.memory)}:
            for series in self._all:
                device.pin(series.engine, place)

    def attach(self, comm: MPI.Intracomm, state: State) -> None:
        """Save with the ranks of ``comm`` from now on."""
        self._everybody = ranks = CommRanks(comm)
        self._saves, self._alone = True, False
        if self._near and ranks.rank == 0:
            # Else they are not found again, which the files make up for.
            with contextlib.suppress(OSError):
                self._saver.send(self._store.note_near)
        for near in self._near:
            near.attach(ranks, state.step)
        self._series.attach(ranks, state.step, soon=False)
        if self._drains:
            self._drains.begin(first=ranks.rank == 0)
        # In memory, in all ranks that train; if there is but one it goes with the node.
        elsewhere = int(ranks.size > 1 and not state.sharded())
        for number, series in enumerate(self._all):
            if series.rhythm:
                series.rhythm.nearer = elsewhere + number
        if self._adapts and ranks.rank == 0:
            self._note(self._past.trains)

    def attach_alone(self, comm: MPI.Intracomm | None, state: State, saves: bool) -> None:
        """Save without the others from now on, if this rank ``saves``.

        Parameters
        ----------
        comm: all ranks, for the end; None if they have to come together before that.
        """
        self._everybody = CommRanks(comm) if comm else None
        for near in self._near if saves else ():
            near.attach(Alone(), state.step)
        if saves == self._saves and self._alone:
            # As before; a save that is under way goes on.
            return
        self._saves, self._alone = saves, True
        self._series.attach(Alone(), state.step, soon=False)
        if self._drains:
            self._drains.begin(first=saves)

    def drop(self) -> None:
        """Give up checkpoints that are not yet on their way into the store."""
        for series in self._all:
            series.drop()

    def settle(self) -> None:
        """Give up checkpoints under way, but wait for one that is on its way into the store."""
        self.drop()
        for series in self._all:
            series.wait()
        self._await_drains()

    def before_update(self) -> None:
        """The parameters are about to change: wait until they are copied."""
        for series in self._all:
            series.wait_copied()

    def edge(self, state: State, metrics: Mapping[str, float]) -> None:
        """A step is complete, in all ranks: look after saves under way, begin what it is time for.

        Parameters
        ----------
        metrics: of this step, as the script gives them.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        for series in self._all if self._saves else ():
            series.edge(state, metrics)
        if self._drains and self._saves:
            self._drains.edge()

    def save(self, state: State, overlap: bool) -> None:
        """The script asks for a save; collective, between two steps.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        if self._saves:
            self._series.save(state, overlap)

    def finish(self, state: State) -> None:
        """Training is over: save where it has come to, and wait until all is committed.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        for near in self._near:
            near.series.wait()
        self._await_drains()
        if self._drains and self._saves and self._saver.ranks.rank == 0:
            self._drains.finish()
        if self._saves:
            self._series.finish(state)
        assert self._everybody is not None
        first = self._everybody.rank == 0
        self.newest, step = self._everybody.share((self._series.step, state.step))
        if self.newest != step:
            # The script has ended well all the same, and so does the run.
            if first:
                self._report("unsaved", state.step, {"newest": self.newest})
            if self._link:
                self._link.send("unsaved")
        elif self._adapts and first:
            self._note(self._past.ends)
        if first and not self._saver.hangs:
            # What it cannot remove now the next start will.
            with contextlib.suppress(OSError):
                self._saver.send(self._store.sweep)

    def any_rank(self, has: bool) -> bool:
        """Whether any rank has something; collective.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        assert self._everybody is not None
        return self._everybody.least(-int(has)) < 0

    def hand_over(self, state: State, durable: bool) -> bool:
        """Save where training has come to for a launch that follows at once; collective.

        Parameters
        ----------
        durable: in the directory, and not, which is faster, near the ranks.

        Returns
        -------
        Whether that could be, in all ranks.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        self.settle()
        series = self._series
        if self._near and not durable:
            self._near[0].await_copies()
            series = self._near[0].series
        if self._saves:
            series.finish(state)
        assert self._everybody is not None
        newest, step = self._everybody.share((series.step, state.step))
        if newest == step and self._adapts and self._everybody.rank == 0:
            self._note(self._past.ends)
        return bool(newest == step)

    def _note(self, write: Callable[[], None]) -> None:
        # What is not written down is estimated less well the next time.
        with contextlib.suppress(OSError):
            if not self._saver.hangs:
                self._saver.send(write)

    def _committed(self, checkpoint: Checkpoint, seconds: float) -> None:
        if self._link:
            self._link.send("saved", step=checkpoint.step, seconds=seconds)
        detail = {"path": str(checkpoint.path), "seconds": round(seconds, 6)}
        self._report("checkpoint", checkpoint.step, detail)
        if self._saver.chosen and self._saver.chosen != self._layout:
            self._layout = layout, why = self._saver.chosen
            self._report("layout", checkpoint.step, {"layout": layout, "why": why})
        self._retain()

    def _retain(self) -> None:
        """Keep, of what is committed, what the user wants."""
        # Should that fail, the next commit tries again; this one is done.
        with contextlib.suppress(OSError):
            self._past.write()
            for old in self._policy.retention.surplus(self._store.committed()):
                self._store.discard(old)

    def _elsewhere(self, since: int) -> tuple[bool, bool]:
        return self._drains.elsewhere(since) if self._drains else (False, False)

    def _await_drains(self) -> None:
        if self._drains:
            self._drains.wait(self._policy.timeout)

    def _failed(self, step: int, error: SaveFailed) -> None:
        if self._saver.ranks.rank == 0:
            self._report("save failed", step, {"why": error.message})

    def _skipped(self, step: int, why: str) -> None:
        if self._saver.ranks.rank == 0:
            self._report("save skipped", step, {"why": why})


@dataclass(frozen=True)
class _Source:
    """A checkpoint to restore.

    where: it is, for people.
    near: its tier, if it lies near the ranks.
    """

    step: int
    where: str
    found: Checkpoint | Scattered
    near: Near | None = None
