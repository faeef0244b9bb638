"""A directory that several nodes may be making at the same time."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path


def make_folder(path: Path) -> None:
    """Make a directory, and those above it, if it is not there.

    It is made under a name that nobody knows, and renamed. For a server of GlusterFS makes a
    directory in two steps, and if another client asks for its name between them, the servers come
    to hold different directories of that name, which is then an input/output error for everybody.

    Raises
    ------
    OSError: it cannot be made.
    """
    if path.is_dir():
        return
    top = path
    while not top.parent.is_dir() and top != top.parent:
        top = top.parent
    aside = top.with_name(f".hpcft-{secrets.token_hex(6)}")
    # With all below it, for while it is empty another's can take its place.
    try:
        (aside / path.relative_to(top)).mkdir(parents=True)
        aside.rename(top)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not top.is_dir():
            raise
        make_folder(path)
