"""A file or directory that is there as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcft.ckpt.convert.claim import abandoned, claimed
from hpcft.ckpt.files import flush_directory
from hpcft.errors import UsageError


@contextmanager
def aside(target: Path, force: bool, ours: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """Give a path beside ``target`` to write to; what is there in the end becomes ``target``.

    Whatever breaks it off, Ctrl-C included, removes what was written and leaves ``target`` as it
    was. What a kill has left is cleared away when the next is written there.

    Parameters
    ----------
    force: replace a target that exists.
    ours: of a directory, whether a file's name is of the kind that is written; one that holds
        others is never replaced. None if a file is written.

    Raises
    ------
    UsageError: the target exists, or cannot be; nothing has been touched.
    OSError: it cannot be made durable.
    """
    if target.parent.is_dir():
        for left in abandoned(target.parent, _prefix(target)):
            _clear(left, target)
    _check(target, force, ours)
    with claimed(target.parent, _prefix(target)) as path:
        try:
            yield path
            if path.is_dir():
                flush_directory(path)
            if target.is_dir():
                # A directory cannot take another's place in one step. In between both are there.
                target.rename(_old(path))
                path.rename(target)
            else:
                path.replace(target)
            flush_directory(target.parent)
        finally:
            _clear(path, target)


def _prefix(target: Path) -> str:
    return f".{target.name}."


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _clear(path: Path, target: Path) -> None:
    """Leave nothing but ``target`` as it was, or as it is now."""
    if _old(path).is_dir():
        if target.exists():
            shutil.rmtree(_old(path), ignore_errors=True)
        else:
            _old(path).rename(target)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _check(target: Path, force: bool, ours: Callable[[str], bool] | None) -> None:
    if not target.parent.is_dir():
        raise UsageError(f"there is no directory {target.parent}", "make it first")
    if not os.path.lexists(target):
        return
    if not force:
        raise UsageError(f"{target} exists", "choose another name, or replace it with --force")
    if target.is_symlink() or not (target.is_file() if ours is None else target.is_dir()):
        kind = "file" if ours is None else "directory"
        raise UsageError(f"{target} exists and is no {kind}", "choose another name")
    others = (
        sorted(entry.name for entry in target.iterdir() if not ours(entry.name)) if ours else []
    )
    if others:
        raise UsageError(
            f"{target} holds {others[0]}, which no export has written, and is not replaced",
            "choose another name, or remove it yourself",
        )
