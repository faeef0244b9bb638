"""Checkpoints of a running job: when one begins, what is in it, where a run starts from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpcft.ckpt import tree
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Save, SaveFailed, Saver
from hpcft.ckpt.store import Checkpoint, Store
from hpcft.errors import HpcftError
from hpcft.train.state import State, dump
from hpcft.train.state import load as undump

#: Steps by which the time of a step is measured.
_MEASURED_STEPS = 5
#: Below the training's own threads in importance.
_NICENESS = 5

Report = Callable[[str, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Plan:
    """What the user wants.

    directory: where checkpoints go.
    every: steps, or seconds if ``timed``, between them.
    keep: how many of the newest to keep.
    memory: bytes of staging memory a rank.
    bandwidth: bytes a second a rank writes at most; 0 is no limit.
    overlap: copy the state while the next step's forward and backward pass run.
    """

    directory: Path
    every: float
    timed: bool
    keep: int
    memory: int
    bandwidth: int
    overlap: bool

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Plan:
        """The plan from the launcher's options."""
        return cls(**{**options, "directory": Path(options["directory"])})


class CommRanks:
    """The ranks of a communicator, as a :class:`hpcft.ckpt.save.Saver` takes them.

    Nothing received is used before it is certain that the communicator was whole: Open MPI 5.0 has
    been seen to cut a collective short without an error.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self.rank: int = comm.rank
        self.size: int = comm.size

    def _certain(self) -> None:
        if self._comm.Is_revoked():
            raise MPI.Exception(MPI.ERR_REVOKED)

    def share(self, value: Any) -> Any:
        """Rank 0's value, in all."""
        package = dump(value) if self.rank == 0 else b""
        length = np.array([len(package)], np.int64)
        self._comm.Bcast(length, 0)
        self._certain()
        buffer = np.frombuffer(package, np.uint8) if package else np.empty(length[0], np.uint8)
        self._comm.Bcast([buffer, MPI.BYTE], 0)
        self._certain()
        return value if self.rank == 0 else undump(buffer.tobytes())

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        found = np.array([number], np.int64)
        self._comm.Allreduce(MPI.IN_PLACE, found, MPI.MIN)
        self._certain()
        return int(found[0])

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, by rank, in rank 0."""
        package = np.frombuffer(dump(value), np.uint8)
        lengths = np.zeros(self.size, np.int64)
        self._comm.Allgather(np.array([package.size], np.int64), lengths)
        self._certain()
        everything = np.empty(int(lengths.sum()) if self.rank == 0 else 0, np.uint8)
        into = [everything, lengths.tolist(), MPI.BYTE] if self.rank == 0 else None
        self._comm.Gatherv([package, MPI.BYTE], into, 0)
        self._certain()
        if self.rank:
            return []
        ends = np.cumsum(lengths)
        return [
            undump(everything[end - n : end].tobytes())
            for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]


class Checkpoints:
    """Saves a training's state as it goes, and restores it.

    Parameters
    ----------
    plan: what the user wants.
    report: told, in rank 0, what has happened: kind, step, detail; also from another thread.
    """

    def __init__(self, plan: Plan, report: Report) -> None:
        self._plan = plan
        self._report = report
        self._store = Store(plan.directory)
        self._engine = Engine(
            plan.memory, bandwidth=plan.bandwidth, niceness=_NICENESS, copiers=2, movers=2
        )
        self._ranks: CommRanks | None = None
        self._saver: Saver | None = None
        self._save: Save | None = None
        self._measured_from = (0, 0.0)
        self._next: int | None = None
        self._committed_step = -1

    # -- restoring -----------------------------------------------------------------------------

    def restore(self, state: State) -> Checkpoint | None:
        """Bring ``state`` to where the newest good checkpoint is; by one rank, for all.

        Returns
        -------
        The checkpoint; None if there is none.

        Raises
        ------
        HpcftError: there are checkpoints and none is good, or it does not fit the state.
        """
        self._store.sweep(keep=1)
        committed = self._store.committed()
        for checkpoint in reversed(committed):
            try:
                step, content = load(checkpoint.state, self._engine)
            except (Damaged, OSError) as error:
                self._report("damaged", checkpoint.step, {"why": str(error)})
                continue
            try:
                state.from_tree(step, content)
            except (KeyError, ValueError, RuntimeError, TypeError) as error:
                raise HpcftError(
                    f"the checkpoint {checkpoint.path} does not fit this training: {error}",
                    "start with the model it was made with, or with another --ckpt-dir",
                ) from error
            self._committed_step = step
            self._report("restore", step, {"path": str(checkpoint.path)})
            return checkpoint
        if committed:
            raise HpcftError(
                f"none of the {len(committed)} checkpoints in {self._store.path} is good",
                "see events.jsonl for what is wrong with each",
            )
        return None

    # -- saving --------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """See early that the state can be saved.

        Raises
        ------
        Unstorable: there is something in it that a checkpoint cannot hold.
        """
        tree.flatten(state.to_tree(frozen=False))

    def attach(self, comm: MPI.Intracomm, state: State) -> None:
        """Save with the ranks of ``comm`` from now on."""
        self.drop()
        self._ranks = CommRanks(comm)
        if self._saver:
            self._saver.regroup(self._ranks)
        else:
            self._saver = Saver(self._store, self._ranks, self._engine)
        self._measured_from = (state.step, time.monotonic())
        self._next = None

    def drop(self) -> None:
        """Give up a checkpoint that is not yet on its way into the store."""
        if self._save:
            self._save.drop()
        if self._save and self._save.settled:
            self._save = None

    def before_update(self) -> None:
        """The parameters are about to change: wait until they are copied."""
        if self._save:
            self._save.wait_copied()

    def edge(self, state: State) -> None:
        """A step is complete, in all ranks: look after the save under way, begin one if it is time.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        try:
            if self._save and not self._save.over:
                self._save.advance()
            if self._due(state.step) and self._free(state.step):
                self._begin(state)
        except SaveFailed as error:
            self._failed(state.step, error)

    def finish(self, state: State) -> None:
        """Training is over: save where it has come to, and wait until all is committed.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        self._wait()
        assert self._ranks is not None
        if self._ranks.share(self._committed_step != state.step):
            try:
                self._begin(state)
            except SaveFailed as error:
                self._failed(state.step, error)
            self._wait()
        if self._ranks.rank == 0:
            self._store.sweep()

    def _wait(self) -> None:
        try:
            while self._save and not self._save.advance():
                time.sleep(0.001)
            if self._save:
                self._save.finish()
        except SaveFailed as error:
            self._failed(self._save.step if self._save else -1, error)
        self._save = None

    def _failed(self, step: int, error: SaveFailed) -> None:
        self._save = None
        if self._ranks and self._ranks.rank == 0:
            self._report("save failed", step, {"why": error.message})

    def _due(self, step: int) -> bool:
        if not self._plan.timed:
            return step % int(self._plan.every) == 0
        if step == self._next:
            return True
        since, began = self._measured_from
        if self._next is None and step >= since + _MEASURED_STEPS:
            self._schedule(step, (time.monotonic() - began) / (step - since))
        return False

    def _schedule(self, step: int, seconds: float) -> None:
        assert self._ranks is not None
        seconds = self._ranks.share(seconds)
        self._next = step + max(1, round(self._plan.every / max(seconds, 1e-9)))
        self._measured_from = (step, time.monotonic())

    def _free(self, step: int) -> bool:
        """Whether the checkpoint before is through, in all ranks."""
        if self._save and self._save.settled:
            try:
                self._save.finish()
            except SaveFailed as error:
                self._failed(self._save.step, error)
            self._save = None
        assert self._ranks is not None
        free = self._ranks.least(int(self._save is None)) == 1
        if not free:
            if self._ranks.rank == 0:
                self._report("save skipped", step, {"why": "the one before is still under way"})
            if self._plan.timed:
                self._next = step + 1
        return free

    def _begin(self, state: State) -> None:
        assert self._saver is not None
        if self._plan.timed:
            since, began = self._measured_from
            self._schedule(state.step, (time.monotonic() - began) / max(1, state.step - since))
        began = time.monotonic()
        content = state.to_tree(frozen=self._plan.overlap)

        def committed(checkpoint: Checkpoint) -> None:
            self._committed_step = checkpoint.step
            seconds = time.monotonic() - began
            detail = {"path": str(checkpoint.path), "seconds": round(seconds, 6)}
            self._report("checkpoint", checkpoint.step, detail)
            for old in self._store.committed()[: -self._plan.keep]:
                self._store.discard(old)

        self._save = self._saver.begin(state.step, content, committed)
        if not self._plan.overlap:
            self._save.wait_copied()
