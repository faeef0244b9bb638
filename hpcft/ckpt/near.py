"""Checkpoints near the ranks: in the memory, or on a disk, of the nodes that train.

Nothing here is shared between nodes. At the same path on every node lies what its own ranks have
written, and copies of what those of another node have, its partner::

    n1    000000000120-3f2a91c0/state.h5                   rank 0's: what the checkpoint consists of
                                metrics.json               what the script said of itself then
                                shard-00000.h5             rank 0's part
                                copies/shard-00003.h5      of n4
    n2    000000000120-3f2a91c0/shard-00001.h5             rank 1's part
                                copies/state.h5            of n1
                                copies/shard-00000.h5      of n1

A checkpoint is there if some node has a whole ``state.h5``, which is written last, and of all other
files in it some node has one. Nobody takes a file for what it should be before its checksums are
right, so nothing is renamed at the end, and nothing is agreed on.

Vocabulary and idea are those of SCR's partner scheme (Moody et al., SC10).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hpcft.ckpt.parity import Parity
from hpcft.ckpt.store import STATE, Checkpoint, write_metrics

#: Where copies are kept in memory: a file system that every Linux has.
MEMORY = "/dev/shm"
_NAME = re.compile(r"(\d{12,})-[0-9a-f]{8}")
_FILE = re.compile(r"state\.h5|metrics\.json|shard-\d{5,}\.h5")
_PREFIX = "hpcft-near-"
_COPIES = "copies"
#: Beside the checkpoints, where one is gathered that a spare is to drain.
_GATHERED = "drain-"
_LOCK = "lock"
#: The last, which may lack copies, the one before that does not, and one in between.
_KEPT_AT_MOST = 3
#: Seconds after which what a run outside of Slurm has left is nobody's any more.
_STALE_TIME = 86400.0


Copies = Literal["partner", "xor", "none"]


@dataclass(frozen=True)
class Tier:
    """Checkpoints near the ranks, as the user wants them.

    every: steps, or seconds if ``timed``, between them.
    longest: as of :class:`hpcft.ckpt.policy.Policy`.
    path: of this run's, the same on all nodes.
    copies: ``partner``: another node has a copy of each file; ``xor``: sets of nodes have parity.
    set_size: nodes of such a set.
    """

    every: float
    timed: bool
    path: str
    copies: Copies = "partner"
    set_size: int = 8
    longest: float | None = None


def place(base: str, directory: str, environ: Mapping[str, str] = os.environ) -> str:
    """Where the files of a run are that saves its checkpoints to ``directory``.

    A later run in the same allocation finds them there; those of other jobs and users do not.
    """
    job = environ.get("SLURM_JOB_ID", "local")
    key = hashlib.sha256(directory.encode()).hexdigest()[:12]
    return str(Path(base) / f"{_PREFIX}{os.getuid()}-{job}-{key}")


@dataclass(frozen=True)
class File:
    """A file on this node.

    name: within the checkpoint.
    copy: of another node's.
    """

    name: str
    size: int
    copy: bool


class NearStore:
    """This node's part of the checkpoints under ``path``.

    Attributes
    ----------
    kept: names of those that stay when another is begun; the same on all nodes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: frozenset[str] = frozenset()

    def begin(self, step: int) -> Path:
        """Where a new one of ``step`` is to be, on all nodes; one rank chooses for all."""
        made = self.path / f"{step:012d}-{secrets.token_hex(4)}"
        made.mkdir(parents=True)
        return made

    def join(self, folder: Path, own: str | None) -> None:
        """Make it on this node; of one not to be kept ``own``, this rank's file, is used again.

        Writing over pages that are there is faster than to have the kernel clear new ones.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for old in self._surplus(folder):
            if own and not (folder / own).exists():
                with contextlib.suppress(OSError):
                    # One with another name is being drained.
                    if (old / own).stat().st_nlink == 1:
                        (old / own).rename(folder / own)

    def commit(
        self, folder: Path, step: int, metrics: Mapping[str, float] | None = None
    ) -> Checkpoint:
        """What is whole is committed."""
        # It is a checkpoint without them, too.
        with contextlib.suppress(OSError):
            write_metrics(folder, metrics)
        return Checkpoint(step, 1, folder)

    def clear(self, newest: Path) -> None:
        """Remove what is older than ``newest``, which has been written, and not to be kept."""
        for old in self._surplus(newest):
            shutil.rmtree(old, ignore_errors=True)

    def forget(self, step: int) -> None:
        """Remove what is newer than ``step``, from which training begins again."""
        for name in self._names():
            if step_of(name) > step:
                shutil.rmtree(self.path / name, ignore_errors=True)

    def clear_all(self) -> None:
        """Remove everything on this node; the lock, by which it is somebody's, comes last."""
        for name in self._names():
            shutil.rmtree(self.path / name, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def files(self) -> dict[str, list[File]]:
        """What this node has, by the checkpoints' names."""
        return {name: list(self._files(self.path / name)) for name in self._names()}

    def find(self, checkpoint: str, file: File) -> Path:
        """Where a file is."""
        folder = self.path / checkpoint
        return folder / _COPIES / file.name if file.copy else folder / file.name

    def parities(self) -> dict[str, list[Parity]]:
        """The parity that this node keeps, by the checkpoints' names."""
        found: dict[str, list[Parity]] = {}
        for name in self._names():
            for file in (self.path / name / _COPIES).glob("parity-*.json"):
                with contextlib.suppress(OSError, ValueError):
                    parity = Parity.of(json.loads(file.read_bytes()))
                    if self.find_parity(name, parity.owner).stat().st_size == parity.size:
                        found.setdefault(name, []).append(parity)
        return found

    def find_parity(self, checkpoint: str, owner: int) -> Path:
        """Where the bytes of parity are that ``owner`` keeps."""
        return self.path / checkpoint / _COPIES / f"parity-{owner:05d}"

    def room_for_parity(self, checkpoint: str, owner: int) -> Path:
        """Where ``owner`` puts together parity; :meth:`keep_parity` is to follow.

        Raises
        ------
        ValueError: it is no name of a checkpoint.
        OSError: there is no room.
        """
        if not _NAME.fullmatch(checkpoint):
            raise ValueError(f"no checkpoint: {checkpoint}"[:200])
        file = self.find_parity(checkpoint, owner)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def keep_parity(self, checkpoint: str, parity: Parity) -> None:
        """It is complete.

        Raises
        ------
        OSError: that cannot be written down.
        """
        said = self.find_parity(checkpoint, parity.owner).with_suffix(".json")
        aside = said.with_suffix(".new")
        aside.write_text(json.dumps(asdict(parity)))
        aside.rename(said)

    def room(self, checkpoint: str, file: str) -> Path:
        """Where a copy of another node's file goes.

        Raises
        ------
        ValueError: it is no name of a file of a checkpoint.
        OSError: there is no room.
        """
        if not (_NAME.fullmatch(checkpoint) and _FILE.fullmatch(file)):
            raise ValueError(f"no file of a checkpoint: {checkpoint}/{file}"[:200])
        folder = self.path / checkpoint / _COPIES
        folder.mkdir(parents=True, exist_ok=True)
        return folder / file

    def gathering(self, launch: str) -> NearStore:
        """Where a checkpoint is gathered on this node that a spare is to drain, as copies.

        Parameters
        ----------
        launch: of the ranks; what is left of another's is not taken for this one's.
        """
        return NearStore(self.path / f"{_GATHERED}{launch}")

    def clear_gathered(self, but: NearStore) -> None:
        """Remove what was gathered here for earlier launches."""
        for folder in self.path.glob(f"{_GATHERED}*"):
            if folder != but.path:
                shutil.rmtree(folder, ignore_errors=True)

    def lend(self, checkpoint: str, file: str, copy: bool, to: NearStore) -> None:
        """Give a file of this node another name in ``to``, which keeps it as it is.

        Parameters
        ----------
        copy: it is one of another node's.

        Raises
        ------
        ValueError: it is no name of a file of a checkpoint.
        OSError: it is not here, or has been given before.
        """
        target = to.room(checkpoint, file)
        os.link(self.find(checkpoint, File(file, 0, copy)), target)

    def gathered(self) -> list[Path]:
        """The folders in which checkpoints are gathered here, oldest first."""
        return [self.path / name / _COPIES for name in self._names()]

    def clear_up_to(self, checkpoint: str) -> None:
        """Remove one, and what is older."""
        for name in self._names():
            if name <= checkpoint:
                shutil.rmtree(self.path / name, ignore_errors=True)

    def clear_copies(self, newest: str) -> None:
        """Remove what nobody keeps, once copies of ``newest`` have come.

        Where ranks train, they do so; but a node that has only spares knows no more than the order.
        """
        older = [name for name in self._names() if name < newest]
        for old in older[:-_KEPT_AT_MOST]:
            shutil.rmtree(self.path / old, ignore_errors=True)

    def clear_others(self) -> bool:
        """Remove what this node keeps of others', who have it as well; whether there was some."""
        kept = [self.path / name / _COPIES for name in self._names()]
        there = [folder for folder in kept if folder.is_dir()]
        for folder in there:
            shutil.rmtree(folder, ignore_errors=True)
        return bool(there)

    def _surplus(self, newest: Path) -> list[Path]:
        older = [name for name in self._names() if name < newest.name]
        return [self.path / name for name in older if name not in self.kept]

    def _names(self) -> list[str]:
        with contextlib.suppress(OSError):
            return sorted(e for e in os.listdir(self.path) if _NAME.fullmatch(e))
        return []

    def _files(self, folder: Path) -> Iterator[File]:
        for copy in (False, True):
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder / _COPIES if copy else folder):
                    # One that cannot be looked at is no reason to leave the others.
                    with contextlib.suppress(OSError):
                        if _FILE.fullmatch(entry.name) and (copy or _complete(entry)):
                            yield File(entry.name, entry.stat().st_size, copy)


def _complete(entry: os.DirEntry[str]) -> bool:
    """Whether a file need not be left out as one that is still being written.

    What says what a checkpoint consists of gets its first bytes last.
    """
    if entry.name != STATE:
        return True
    with open(entry.path, "rb") as file:
        return file.read(8) != bytes(8)


def step_of(name: str) -> int:
    """The step of the checkpoint that is so called."""
    return int(name.partition("-")[0])


@contextlib.contextmanager
def claimed(tiers: tuple[Tier, ...], now: float) -> Iterator[None]:
    """Hold the paths of a run on this node as long as it runs; remove what others have left.

    Parameters
    ----------
    now: the time, in seconds since 1970.
    """
    with contextlib.ExitStack() as held:
        for tier in tiers:
            path = Path(tier.path)
            # A full or missing disk is found, and told, when something is to be saved.
            with contextlib.suppress(OSError):
                _sweep(path, now)
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                held.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


def _sweep(own: Path, now: float) -> None:
    """Remove what this user's jobs that have ended have left beside ``own``."""
    _, _, user, job, _ = own.name.split("-")
    for folder in own.parent.glob(f"{_PREFIX}{user}-*"):
        theirs = folder.name.split("-")[3]
        if theirs == job and (job != "local" or now - folder.stat().st_mtime < _STALE_TIME):
            continue
        with contextlib.suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
