"""Restoring what lies in pieces on several nodes (:mod:`hpcft.ckpt.near`); collective.

All ranks say what their nodes have. What a file of a checkpoint holds is read by a rank whose node
has the file, the one that wrote it if that can be, and goes from there to the ranks that need it.
Where a checksum is not right, or the file cannot be read, another node's copy of it is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.index import Damaged, Index
from hpcft.ckpt.near import File, NearStore, step_of
from hpcft.ckpt.parity import Parity
from hpcft.ckpt.ranks import Ranks
from hpcft.ckpt.reader import opened
from hpcft.ckpt.rebuild import Recipe, Source, matching, rebuild
from hpcft.ckpt.restore import Target, restore
from hpcft.ckpt.store import STATE, shard, writer

#: In place of a node, of a file that has been made from parity.
_MADE = "parity"
#: A file on a node: node, name, whether it is a copy.
Place = tuple[str, str, bool]


@dataclass(frozen=True)
class Copy:
    """A file on a node, as a rank there sees it."""

    rank: int
    node: str
    file: File


@dataclass
class Scattered:
    """A checkpoint that lies on several nodes.

    files: by name, where there are such.
    parities: with a rank that can read it.
    """

    name: str
    files: dict[str, list[Copy]] = field(default_factory=dict)
    parities: list[tuple[int, Parity]] = field(default_factory=list)

    @property
    def step(self) -> int:
        return step_of(self.name)


def find(ranks: Ranks, store: NearStore) -> list[Scattered]:
    """The checkpoints of which there may be enough, oldest first; collective."""
    # Ranks that see the same directory are on the same node.
    node = socket.gethostname()
    with_inode = f"{node} {os.stat(store.path).st_ino}" if store.path.exists() else node
    found: dict[str, Scattered] = {}
    mine = with_inode, store.files(), store.parities()
    for rank, (where, theirs, parities) in enumerate(ranks.gather(mine)):
        for name, kept in parities.items():
            found.setdefault(name, Scattered(name)).parities += [(rank, one) for one in kept]
        for name, files in theirs.items():
            one = found.setdefault(name, Scattered(name))
            for file in files:
                one.files.setdefault(file.name, []).append(Copy(rank, where, file))
    checkpoints = [one for _, one in sorted(found.items()) if STATE in one.files]
    shared: list[Scattered] = ranks.share(checkpoints)
    return shared


def load(
    checkpoint: Scattered,
    store: NearStore,
    engine: Engine,
    ranks: Ranks,
    target: Target,
    wanted: bool,
    report: Callable[[str], None],
) -> tuple[int, dict[str, Any]]:
    """Read it; collective.

    Parameters
    ----------
    wanted: whether this rank wants the state; else it only reads for others.
    report: told of copies that are no good, for which others are looked for.

    Returns
    -------
    (step, tree): steps completed, and the state; empty if it is not wanted.

    Raises
    ------
    Damaged: there is no good copy of some file. The same in all ranks.
    """
    bad: set[Place] = set()
    with _state_file(checkpoint, store, ranks) as path:
        while True:
            with opened(path, others=False) as found:
                _rebuild_missing(checkpoint, found.index, bad, ranks, store)
                chosen = _chosen(checkpoint, found.index, bad, ranks)
            places = {
                copy.file.name: store.find(checkpoint.name, copy.file)
                for copy in chosen[1:]
                if copy.rank == ranks.rank
            }
            owners = [0, *(copy.rank for copy in chosen[1:])]
            try:
                return restore(path, engine, ranks, target, wanted, owners, places.__getitem__)
            except Damaged as error:
                new = {
                    (copy.node, copy.file.name, copy.file.copy)
                    for copy in chosen[1:]
                    if copy.file.name in error.files
                } - bad
                message = error.message.removeprefix(f"{path}: ")
                if not new:
                    raise Damaged(message, error.remedy) from error
                bad |= new
                said = ", ".join(f"{name} on {node.split()[0]}" for node, name, _ in sorted(new))
                report(f"not taken are {said}: {message}")


def _chosen(checkpoint: Scattered, content: Index, bad: set[Place], ranks: Ranks) -> list[Copy]:
    """Of each file the copy that is read; of the first, which all have by now, any.

    Raises
    ------
    Damaged: there is none of some file.
    """
    load = [0] * ranks.size
    chosen = [checkpoint.files[STATE][0]]
    for file in content.files[1:]:
        copies = _good_ones(checkpoint, file.name, file.size, bad)
        if not copies:
            raise Damaged(f"no node has a good {file.name}", "restore another checkpoint")
        # Who has written it most likely needs it.
        best = min(
            copies,
            key=lambda copy: (copy.file.name != shard(copy.rank), load[copy.rank], copy.file.copy),
        )
        load[best.rank] += file.size
        chosen.append(best)
    return chosen


def _good_ones(checkpoint: Scattered, name: str, size: int, bad: set[Place]) -> list[Copy]:
    """Where a file is, as far as is known."""
    return [
        copy
        for copy in checkpoint.files.get(name, [])
        if copy.file.size == size and (copy.node, name, copy.file.copy) not in bad
    ]


def _rebuild_missing(
    checkpoint: Scattered, content: Index, bad: set[Place], ranks: Ranks, store: NearStore
) -> None:
    """Make the files that no node has, from parity, where that can be; collective."""
    sizes = {file.name: file.size for file in content.files[1:]}
    for name, size in sizes.items():
        made_before = any(copy.node == _MADE for copy in checkpoint.files.get(name, []))
        if made_before or _good_ones(checkpoint, name, size, bad):
            continue
        keepers = matching(checkpoint.parities, name)
        if not keepers:
            continue
        one = next(iter(keepers.values()))[1]
        lost = one.members[one.names.index(name)]
        files: list[Source] = []
        for _, parity in keepers.values():
            # Each knows the names of all files but its own.
            for member, theirs, length in zip(
                parity.members, parity.names, parity.sizes, strict=True
            ):
                if theirs and member != lost and all(f.member != member for f in files):
                    copies = _good_ones(checkpoint, theirs, length, bad)
                    if copies:
                        where = store.find(checkpoint.name, copies[0].file)
                        files.append(Source(copies[0].rank, member, length, where))
        parities = [
            Source(rank, owner, parity.size, store.find_parity(checkpoint.name, owner))
            for owner, (rank, parity) in keepers.items()
        ]
        recipe = Recipe(lost, size, one.members, tuple(files), tuple(parities))
        # Who has written it, if there are as many ranks, for it most likely needs it.
        maker = writer(name) % ranks.size
        made = File(name, size, copy=False)
        failed = 0
        try:
            rebuild(ranks, recipe, maker, store.find(checkpoint.name, made))
        except OSError:
            failed = -1
        # It cannot be relied on more than what it was made from: its checksums tell.
        if ranks.least(failed) == 0:
            checkpoint.files.setdefault(name, []).append(Copy(maker, _MADE, made))


@contextmanager
def _state_file(checkpoint: Scattered, store: NearStore, ranks: Ranks) -> Iterator[Path]:
    """The file that says what the checkpoint consists of, in the memory of each rank.

    Raises
    ------
    Damaged: no node has a good one.
    """
    mine = [copy.file for copy in checkpoint.files[STATE] if copy.rank == ranks.rank]
    content = next(filter(None, (_good(store.find(checkpoint.name, file)) for file in mine)), None)
    holders = ranks.gather(content is not None)
    holder = ranks.share(holders.index(True) if any(holders) else -1)
    if holder < 0:
        raise Damaged("no node has a good state.h5", "restore another checkpoint")
    sent: Sequence[bytes | None] = ranks.gather(content if ranks.rank == holder else None)
    content = ranks.share(sent[holder] if ranks.rank == 0 else None)
    assert content is not None
    memory = os.memfd_create("hpcft-state", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(memory), "wb") as file:
            file.write(content)
        yield Path(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)


def _good(path: Path) -> bytes | None:
    """A state file's bytes, if its index is whole."""
    try:
        with opened(path, others=False):
            return path.read_bytes()
    except (Damaged, OSError):
        return None
