"""Saving a state while training goes on.

In every rank, at the same step::

    begin       agree on a layout and a directory aside; hand this rank's parts to the engine
    (copied)    the state may change again
    advance     at later step edges: is everybody's part on disk?  (one small agreement each)
    gather      when it is: rank 0 gets all checksums; the others are through
    (commit)    rank 0, in a thread of its own: metadata and checksums, flush, rename

A save that fails in one rank is dropped by all; what was committed before stays.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hpcft.ckpt import index, layout, plan
from hpcft.ckpt._engine import Engine, Transfer, crc32c
from hpcft.ckpt.files import OpenFile
from hpcft.ckpt.index import OWN
from hpcft.ckpt.layout import PAGE, Layout
from hpcft.ckpt.spec import Node, Spec
from hpcft.ckpt.store import STATE, Checkpoint, Store
from hpcft.ckpt.tree import Leaf, flatten
from hpcft.errors import HpcftError


class SaveFailed(HpcftError):
    """A checkpoint could not be written; the ones before it are as they were."""


class Ranks(Protocol):
    """The ranks that save together. All calls are collective."""

    rank: int
    size: int

    def share(self, value: Any) -> Any:
        """Rank 0's value, in all."""

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""

    def gather(self, value: Any) -> list[Any]:
        """All ranks' values, by rank, in rank 0; nothing in the others."""


class Alone:
    """A process that saves by itself."""

    rank = 0
    size = 1

    def share(self, value: Any) -> Any:
        return value

    def least(self, number: int) -> int:
        return number

    def gather(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class _Planned:
    """What does not change as long as the shapes of the state do not.

    shape: structure and leaves of the state.
    text: the index's JSON.
    own: numbers of the leaves index, places and checksums.
    """

    shape: tuple[Node, list[Spec]]
    layout: Layout
    text: bytes
    own: tuple[int, int, int]


class Saver:
    """Writes checkpoints of a training.

    Parameters
    ----------
    store: where to.
    ranks: who takes part.
    engine: does the work.
    """

    def __init__(self, store: Store, ranks: Ranks, engine: Engine) -> None:
        self.store = store
        self.engine = engine
        self.ranks = ranks
        self._planned: _Planned | None = None
        #: Of a save that was dropped, and may still be writing to a file the next one gets.
        self.leftover: Transfer | None = None

    def regroup(self, ranks: Ranks) -> None:
        """Go on with other ranks."""
        self.ranks = ranks
        self._planned = None

    def begin(
        self, step: int, tree: dict[str, Any], committed: Callable[[Checkpoint], None] | None = None
    ) -> Save:
        """Begin to save; collective.

        Parameters
        ----------
        step: steps completed.
        tree: the state; equal in all ranks. It must not change until :meth:`Save.wait_copied`.
        committed: called in rank 0, in another thread, when the checkpoint is committed.

        Raises
        ------
        Unstorable: the state holds something that no checkpoint can.
        SaveFailed: the file cannot be made.
        """
        ranks = self.ranks
        if OWN in tree:
            raise HpcftError(f"a state cannot have a part called {OWN!r}", "choose another")
        if self.leftover:
            with contextlib.suppress(OSError):
                self.leftover.wait()
            self.leftover = None
        structure, leaves = flatten(tree)
        planned = self._plan(structure, [leaf.spec for leaf in leaves])
        aside, why = None, ""
        if ranks.rank == 0:
            try:
                aside = self.store.begin()
                with OpenFile.for_writing(aside / STATE) as file:
                    file.resize(planned.layout.size)
            except OSError as error:
                why = str(error)
        aside, why = ranks.share((aside, why))
        if aside is None:
            raise SaveFailed(f"no checkpoint of step {step}: {why}")
        return Save(self, planned, step, leaves, aside, committed)

    def _plan(self, structure: Node, specs: list[Spec]) -> _Planned:
        ranks, shape = self.ranks, (structure, specs)
        if not ranks.least(int(self._planned is not None and self._planned.shape == shape)):
            # Rank 0's plan is everybody's, for another version of HDF5 may come to another.
            self._planned = ranks.share(_make(structure, specs) if ranks.rank == 0 else None)
            assert self._planned is not None
            if not ranks.least(int(self._planned.shape == shape)):
                self._planned = None
                raise HpcftError(
                    "the ranks' states differ in names or shapes, and cannot be one checkpoint",
                    "track only what is the same in all ranks",
                )
        assert self._planned is not None
        return self._planned


def _make(structure: Node, specs: list[Spec]) -> _Planned:
    count = len(specs) + 3
    text = b""
    # Its own length is part of it.
    while len(text) != len(again := index.encode(*_with_own(structure, specs, len(text)))):
        text = again
    _, all_specs = _with_own(structure, specs, len(text))
    own = (count - 3, count - 2, count - 1)
    return _Planned((structure, specs), layout.make(all_specs), again, own)


def _with_own(structure: Node, specs: list[Spec], length: int) -> tuple[Node, list[Spec]]:
    """Structure and leaves with those that describe them."""
    count = len(specs)
    own = [
        Spec(f"/{OWN}/index", "ndarray", "uint8", (length,)),
        Spec(f"/{OWN}/places", "ndarray", "uint64", (count + 3,)),
        Spec(f"/{OWN}/checksums", "ndarray", "uint32", (count + 3,)),
    ]
    node = ["dict", [["index", count], ["places", count + 1], ["checksums", count + 2]]]
    assert isinstance(structure, list)
    kind, items = structure
    return [kind, [*items, [OWN, node]]], [*specs, *own]


class Save:
    """A checkpoint on its way; made by :meth:`Saver.begin`.

    Attributes
    ----------
    step: of the state that is saved.
    over: this rank has no further part in it.
    """

    def __init__(
        self,
        saver: Saver,
        planned: _Planned,
        step: int,
        leaves: list[Leaf],
        aside: Path,
        committed: Callable[[Checkpoint], None] | None,
    ) -> None:
        self.step = step
        self.over = False
        self._saver = saver
        self._planned = planned
        self._aside = aside
        self._committed = committed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        ranks = saver.ranks
        specs = planned.layout.specs
        self._parts = [
            part
            for part in plan.share(specs, ranks.rank, ranks.size)
            if part.leaf not in planned.own
        ]
        self._transfer: Transfer | None = self._hand_over(leaves)

    def _hand_over(self, leaves: list[Leaf]) -> Transfer | None:
        places = self._planned.layout.places
        self._order = sorted(self._parts, key=lambda part: places[part.leaf] + part.begin)
        fill = plan.fillers(self._planned.layout, self._order)
        extents: list[tuple[Any, int, int, int]] = [
            (
                leaves[part.leaf].memory[part.begin : part.end],
                0,
                places[part.leaf] + part.begin,
                part.end - part.begin,
            )
            for part in self._order
        ] + [(None, 0, offset, length) for offset, length in fill]
        numbers = sorted(range(len(extents)), key=lambda i: extents[i][2])
        self._sums_at = {n: i for i, n in enumerate(numbers)}
        try:
            with OpenFile.for_writing(self._aside / STATE) as file:
                return self._saver.engine.write([file.for_engine], [extents[n] for n in numbers])
        except OSError as error:
            self._error = error
            return None

    def wait_copied(self) -> None:
        """Wait until the state may change again."""
        if self._transfer:
            try:
                self._transfer.wait_copied()
            except OSError as error:
                self._error = error

    @property
    def settled(self) -> bool:
        """Whether this rank is through, and, where it commits, has done so or failed."""
        return self.over and not (self._thread and self._thread.is_alive())

    def drop(self) -> None:
        """Give it up, unless the commit has begun.

        Not collective, and does not wait: for when other ranks have failed.
        """
        if self.over:
            return
        self.over = True
        if self._transfer:
            self._transfer.cancel()
        self._saver.leftover, self._transfer = self._transfer, None

    def advance(self) -> bool:
        """See whether all ranks have written their parts; collective until this rank is through.

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
        status = self._status()
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

    def _status(self) -> int:
        """-1 failed, 0 under way, 1 written."""
        if self._error or self._transfer is None:
            return -1
        try:
            return int(self._transfer.wait(0))
        except OSError as error:
            self._error = error
            return -1

    def _gather(self) -> None:
        assert self._transfer is not None
        sums = self._transfer.checksums()
        own = [plan.Summed(part, sums[self._sums_at[i]]) for i, part in enumerate(self._order)]
        everybodys = self._saver.ranks.gather(own)
        self._transfer = None
        self.over = True
        if self._saver.ranks.rank == 0:
            summed = [one for ranks_own in everybodys for one in ranks_own]
            self._thread = threading.Thread(
                target=self._commit, args=(summed,), name="hpcft-commit", daemon=True
            )
            self._thread.start()

    def _commit(self, summed: list[plan.Summed]) -> None:
        try:
            extents = _last(self._planned, self.step, summed)
            with OpenFile.for_writing(self._aside / STATE) as file:
                self._saver.engine.write([file.for_engine], extents).wait()
            checkpoint = self._saver.store.commit(self._aside, self.step)
            if self._committed:
                self._committed(checkpoint)
        except BaseException as error:
            self._error = error

    def finish(self, timeout: float | None = None) -> None:
        """Wait for the commit, in the rank that makes it, once :meth:`advance` says through.

        Raises
        ------
        SaveFailed: it failed.
        """
        if self._thread:
            self._thread.join(timeout)
        if self._error:
            raise SaveFailed(f"no checkpoint of step {self.step}: {self._error}") from self._error


def _last(
    planned: _Planned, step: int, summed: list[plan.Summed]
) -> list[tuple[Any, int, int, int]]:
    """What is written when all checksums are known, as extents for the engine."""
    made = planned.layout
    sums = plan.combine(made.specs, summed)
    text_at, places_at, sums_at = planned.own
    places = np.array(made.places, "<u8").tobytes()
    sums[text_at], sums[places_at] = crc32c(planned.text), crc32c(places)
    # A checksum cannot be among what it is of; in the list its own is 0.
    checksums = np.array(sums, "<u4").tobytes()
    contents = {text_at: planned.text, places_at: places, sums_at: checksums}
    stretches = {
        leaf: index.Stretch(made.places[leaf], len(content), crc32c(content))
        for leaf, content in contents.items()
    }
    sums[sums_at] = stretches[sums_at].checksum
    header = index.Header(
        made.size, step, stretches[text_at], stretches[places_at], stretches[sums_at]
    ).encode()
    extents = [(header.ljust(PAGE, b"\0"), 0, 0, PAGE)]
    extents += [(content, 0, made.places[leaf], len(content)) for leaf, content in contents.items()]
    extents += [
        (bytes(content), 0, offset, len(content)) for offset, content in _patched(made, sums)
    ]
    return sorted(extents, key=lambda extent: extent[2])


def _patched(made: Layout, sums: list[int]) -> list[tuple[int, bytearray]]:
    """The metadata with every leaf's checksum in its attribute."""
    stretches = [(offset, bytearray(content)) for offset, content in made.metadata]
    starts = np.array([offset for offset, _ in stretches])
    where = np.searchsorted(starts, made.checksum_places, side="right") - 1
    for leaf, (number, place) in enumerate(zip(where, made.checksum_places, strict=True)):
        offset, content = stretches[number]
        content[place - offset : place - offset + 4] = sums[leaf].to_bytes(4, "little")
    return stretches
