"""A directory of checkpoints: each is there as a whole, or not at all.

::

    step-000000000120/state.h5        a committed checkpoint, of 120 steps
    step-000000000120/shard-00003.h5  rank 3's part of it, if each rank writes a file of its own
    step-000000000120/metrics.json    what the script said of itself then, such as its loss
    step-000000000120/evaluation.json what it was found to be worth (:mod:`hpcft.ckpt.evaluated`)
    .aside-3f2a91c0/state.h5          one being written, or left unfinished
    .drain-77c0e2b5/state.h5          one that a spare writes (:mod:`hpcft.ckpt.drain`)
    .old-5b07d1e4/state.h5            one no longer wanted
    .near                             there may be newer ones near the ranks
    .lock                             of who writes here (:mod:`hpcft.ckpt.lock`)

A checkpoint is written aside, flushed (file, then directory), and renamed, which is the commit; and
the directory is flushed, so that the name is there after a power cut. One that is not wanted any
more is renamed first, and written over by the next. So what a kill or a power cut leaves is a name
of one of these kinds, and only the first is somebody's.

What was left unfinished is never written over, but deleted: a node that was cut off, or a process
that hangs in the kernel, may still write to its file, at whatever time its file system lets it.

What a spare has written rank 0 commits, by the name that it is told, and nobody else. So whatever a
spare still does that was cut off, or replaced, it commits nothing; and who begins anew renames what
was left, so that a commit that comes late finds nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcft.ckpt import evaluated
from hpcft.ckpt.files import flush_directory
from hpcft.ckpt.lock import Lock, Standing
from hpcft.errors import HpcftError
from hpcft.telemetry.folder import make_folder

#: The file of a checkpoint that holds the state, or says where it is.
STATE = "state.h5"
#: The file of a checkpoint that holds the metrics of its step.
METRICS = "metrics.json"
_COMMITTED = re.compile(r"step-(\d{12,})(?:\.(\d+))?")
_ASIDE, _DRAIN, _OLD = ".aside-", ".drain-", ".old-"
_DRAINED = re.compile(re.escape(_DRAIN) + "[0-9a-f]{8}")
_NEAR = ".near"


def shard(rank: int) -> str:
    """The name of the file that a rank by itself writes."""
    return f"shard-{rank:05d}.h5"


def writer(name: str) -> int:
    """The rank that has written a file so called; 0 for one that all have."""
    found = re.fullmatch(r"shard-(\d+)\.h5", name)
    return int(found[1]) if found else 0


def files(directory: Path) -> list[Path]:
    """The files of the checkpoint that lies, or is being written, in a directory.

    Raises
    ------
    OSError: there is no such directory.
    """
    return sorted(e for e in directory.iterdir() if e.suffix == ".h5")


@dataclass(frozen=True, order=True)
class Checkpoint:
    """A committed checkpoint.

    step: steps completed.
    edition: counts the checkpoints of the same step, from 1.
    """

    step: int
    edition: int
    path: Path

    @property
    def state(self) -> Path:
        return self.path / STATE

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of its step, by name; none if the file cannot be read.

        Those of an evaluation, if there was one, come after the others, as ``validation/<name>``.
        """
        return read_metrics(self.path) | evaluated.metrics(self.path, self.step)


def write_metrics(folder: Path, metrics: Mapping[str, float] | None) -> None:
    """Have metrics of its step lie beside a checkpoint, and on the disk.

    Raises
    ------
    OSError: they cannot be written.
    """
    finite = {k: v for k, v in (metrics or {}).items() if math.isfinite(v)}
    with (folder / METRICS).open("w") as file:
        json.dump(finite, file)
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> dict[str, float]:
    """Metrics that lie beside a checkpoint, by name; none if they cannot be read."""
    try:
        said = json.loads((folder / METRICS).read_bytes())
        return {str(name): float(value) for name, value in said.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class Store:
    """The checkpoints under ``path``.

    Parameters
    ----------
    lock: without which nothing is begun or removed; None if nobody else can be writing here.
    """

    def __init__(self, path: Path, lock: Lock | None = None) -> None:
        self.path = path
        self._lock = lock

    def create(self) -> Store:
        """Make the directory if it does not exist; returns this.

        Raises
        ------
        HpcftError: it cannot be made.
        """
        try:
            make_folder(self.path)
        except OSError as error:
            raise HpcftError(
                f"the checkpoint directory cannot be made: {error}", "give another --ckpt-dir"
            ) from error
        return self

    def committed(self) -> list[Checkpoint]:
        """All checkpoints, oldest step first; none if there is no such directory.

        Raises
        ------
        OSError: it cannot be looked through.
        """
        found = []
        for entry in self.path.iterdir() if self.path.exists() else ():
            if match := _COMMITTED.fullmatch(entry.name):
                found.append(Checkpoint(int(match[1]), int(match[2] or 1), entry))
        return sorted(found)

    def begin(self, step: int) -> Path:
        """A directory aside to write a checkpoint into; one that is not wanted any more will do.

        It gets its name by ``step`` when it is committed.

        Its file may exist, of whatever size and content: writing over it is faster than making it
        anew, for its blocks are there. What lies unfinished is deleted.

        Raises
        ------
        OSError: it cannot be made, or another run is writing here.
        """
        self._see_lock()
        for entry in self.aside():
            self._delete(entry)
        return self._room(_ASIDE)

    def begin_drain(self) -> Path:
        """As :meth:`begin`, by a spare; what spares have left, or are writing, is deleted.

        Raises
        ------
        OSError: it cannot be made.
        """
        self.sweep_drains()
        return self._room(_DRAIN)

    def _room(self, kind: str) -> Path:
        made = self._new(kind)
        for entry in self._named(_OLD):
            try:
                # Before it is renamed: after that a change would look like writing (ckpt.watch).
                (entry / evaluated.NAME).unlink(missing_ok=True)
                entry.rename(made)
            except OSError:
                continue
            return made
        made.mkdir()
        return made

    def join(self, folder: Path, own: str | None) -> None:
        """Every rank sees the directory that one has made."""

    def commit(
        self, folder: Path, step: int, metrics: Mapping[str, float] | None = None
    ) -> Checkpoint:
        """Make what lies aside, its files flushed, the newest checkpoint of ``step``.

        Raises
        ------
        OSError: it could not be made durable; it is not committed then.
        """
        self.complete(folder, metrics)
        return self._publish(folder, step)

    def complete(self, folder: Path, metrics: Mapping[str, float] | None) -> None:
        """All that is left to do of what lies aside, its files flushed, before the commit.

        Raises
        ------
        OSError: it could not be made durable.
        """
        write_metrics(folder, metrics)
        flush_directory(folder)

    def take_in(self, drained: str, step: int) -> Checkpoint:
        """Commit what a spare has completed.

        Parameters
        ----------
        drained: what it is called here.

        Raises
        ------
        OSError: it is there no more, could not be made durable, or another run is writing here.
        """
        self._see_lock()
        return self._publish(self._drained(drained), step)

    def refuse(self, drained: str) -> None:
        """Remove what a spare has completed."""
        self._delete(self._drained(drained))

    def _drained(self, name: str) -> Path:
        if not _DRAINED.fullmatch(name):
            raise FileNotFoundError(f"nothing that a spare has written: {name}"[:200])
        return self.path / name

    def _publish(self, folder: Path, step: int) -> Checkpoint:
        editions = [c.edition for c in self.committed() if c.step == step]
        edition = max(editions, default=0) + 1
        name = f"step-{step:012d}" + (f".{edition}" if edition > 1 else "")
        target = self.path / name
        folder.rename(target)
        flush_directory(self.path)
        return Checkpoint(step, edition, target)

    @property
    def has_near(self) -> bool:
        """Whether there may be checkpoints near the ranks, which belong to those here.

        Who deletes this directory to start from the beginning does not know of them.

        Raises
        ------
        OSError: it cannot be told.
        """
        return (self.path / _NEAR).exists()

    def note_near(self) -> None:
        """There may be from now on.

        Raises
        ------
        OSError: that cannot be written down.
        """
        (self.path / _NEAR).touch()

    def discard(self, checkpoint: Checkpoint) -> Path:
        """Uncommit a checkpoint; its blocks serve the next.

        Returns
        -------
        Where it lies now.

        Raises
        ------
        OSError: it cannot be renamed.
        """
        return checkpoint.path.rename(self._new(_OLD))

    def remove(self, checkpoint: Checkpoint) -> None:
        """Uncommit a checkpoint and delete it; what else lies about is left alone.

        Raises
        ------
        OSError: it cannot be renamed.
        """
        shutil.rmtree(self.discard(checkpoint), ignore_errors=True)

    def sweep(self, keep: int = 0) -> None:
        """Remove what is no checkpoint, but for ``keep`` of the old. Nobody may be writing.

        Raises
        ------
        OSError: the directory cannot be read, or another run is writing here.
        """
        self._see_lock()
        for entry in self.aside() + self.drains() + self._named(_OLD)[keep:]:
            self._delete(entry)

    def sweep_drains(self) -> None:
        """Remove what spares have written, and not all of it was committed.

        Raises
        ------
        OSError: the directory cannot be read.
        """
        for entry in self.drains():
            self._delete(entry)

    def _see_lock(self) -> None:
        if self._lock and self._lock.take() is Standing.TAKEN:
            raise BlockingIOError(self._lock.said)

    def aside(self) -> list[Path]:
        """What is being written, or was left unfinished."""
        return self._named(_ASIDE)

    def drains(self) -> list[Path]:
        """What a spare is writing, has written for rank 0 to commit, or has left."""
        return self._named(_DRAIN)

    def _delete(self, entry: Path) -> None:
        # Under another name, so that who comes late to commit it finds nothing, rather than a part.
        with contextlib.suppress(OSError):
            shutil.rmtree(entry.rename(self._new(_ASIDE)), ignore_errors=True)

    def _new(self, kind: str) -> Path:
        return self.path / f"{kind}{secrets.token_hex(4)}"

    def _named(self, kind: str) -> list[Path]:
        return sorted(e for e in self.path.iterdir() if e.name.startswith(kind))
