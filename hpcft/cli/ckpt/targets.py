"""What of the command line names checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpcft.errors import UsageError

if TYPE_CHECKING:
    from hpcft.ckpt.store import Store

#: Of an engine that reads or writes: enough to keep a disk busy.
MEMORY = 64 << 20

# Here and in the sub-commands, what needs libraries that load slowly is imported within functions.


def store(directory: Path) -> Store:
    """The checkpoints of a directory.

    Raises
    ------
    UsageError: there is no such directory.
    """
    from hpcft.ckpt.store import Store

    if not directory.is_dir():
        raise UsageError(f"there is no directory {directory}", "name one that --ckpt-dir named")
    return Store(directory)


def files(target: Path) -> list[Path]:
    """The files that are meant: of a checkpoint, or of all in a directory, oldest first.

    Raises
    ------
    UsageError: there are none.
    """
    from hpcft.ckpt.store import STATE

    if target.is_file():
        return [target]
    if (target / STATE).is_file():
        return [target / STATE]
    found = [checkpoint.state for checkpoint in store(target).committed()]
    if not found:
        raise UsageError(f"there is no checkpoint in {target}", "see hpcft ckpt ls")
    return found


def file(target: Path, step: int | None = None) -> Path:
    """The file that is meant; of those in a directory, the newest, or that of a step.

    Raises
    ------
    UsageError: there is none.
    """
    if step is None:
        return files(target)[-1]
    known = store(target).committed()
    found = [checkpoint.state for checkpoint in known if checkpoint.step == step]
    if not found:
        there = ", ".join(str(checkpoint.step) for checkpoint in known[-5:]) or "none"
        raise UsageError(f"there is no checkpoint of step {step} in {target}", f"last are: {there}")
    return found[-1]
