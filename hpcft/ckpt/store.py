"""A directory of checkpoints: each is there as a whole, or not at all.

::

    step-000000000120/state.h5     a committed checkpoint, of 120 steps
    .aside-3f2a91c0/state.h5       one being written, or one no longer wanted

A checkpoint is written aside, flushed (file, then directory), and renamed, which is the commit; and
the directory is flushed, so that the name is there after a power cut. One that is not wanted any
more is renamed aside first. So what a kill or a power cut leaves is a name of either kind, and what
lies aside is nobody's.
"""

from __future__ import annotations

import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from hpcft.ckpt.files import flush_directory
from hpcft.errors import HpcftError

#: The file of a checkpoint that holds the state.
STATE = "state.h5"
_COMMITTED = re.compile(r"step-(\d{12,})(?:\.(\d+))?")
_ASIDE = ".aside-"


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


class Store:
    """The checkpoints under ``path``, which is made if it does not exist.

    Raises
    ------
    HpcftError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HpcftError(
                f"the checkpoint directory cannot be made: {error}", "give another --ckpt-dir"
            ) from error

    def committed(self) -> list[Checkpoint]:
        """All checkpoints, oldest step first."""
        found = []
        for entry in self.path.iterdir():
            if match := _COMMITTED.fullmatch(entry.name):
                found.append(Checkpoint(int(match[1]), int(match[2] or 1), entry))
        return sorted(found)

    def begin(self) -> Path:
        """A directory aside to write a checkpoint into; one lying about is used again.

        Its file may exist, of whatever size and content: writing over it is faster than making it
        anew, for its blocks are there.
        """
        aside = self._new_aside()
        for entry in self._aside():
            try:
                entry.rename(aside)
            except OSError:
                continue
            return aside
        aside.mkdir()
        return aside

    def commit(self, aside: Path, step: int) -> Checkpoint:
        """Make what lies aside, its files flushed, the newest checkpoint of ``step``.

        Raises
        ------
        OSError: it could not be made durable; it is not committed then.
        """
        flush_directory(aside)
        editions = [c.edition for c in self.committed() if c.step == step]
        edition = max(editions, default=0) + 1
        name = f"step-{step:012d}" + (f".{edition}" if edition > 1 else "")
        target = self.path / name
        aside.rename(target)
        flush_directory(self.path)
        return Checkpoint(step, edition, target)

    def discard(self, checkpoint: Checkpoint) -> Path:
        """Uncommit a checkpoint; its blocks serve the next.

        Returns
        -------
        Where it lies now.

        Raises
        ------
        OSError: it cannot be renamed.
        """
        return checkpoint.path.rename(self._new_aside())

    def remove(self, checkpoint: Checkpoint) -> None:
        """Uncommit a checkpoint and delete it; what else lies aside is left alone.

        Raises
        ------
        OSError: it cannot be renamed.
        """
        shutil.rmtree(self.discard(checkpoint), ignore_errors=True)

    def sweep(self, keep: int = 0) -> None:
        """Remove what lies aside, but for ``keep`` of it. Nobody may be writing."""
        for entry in self._aside()[keep:]:
            shutil.rmtree(entry, ignore_errors=True)

    def _new_aside(self) -> Path:
        return self.path / f"{_ASIDE}{secrets.token_hex(4)}"

    def _aside(self) -> list[Path]:
        return sorted(e for e in self.path.iterdir() if e.name.startswith(_ASIDE))
