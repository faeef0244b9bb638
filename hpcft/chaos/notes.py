"""What has to be undone, written down before it is done: ``chaos/*.json`` in the run directory.

Who is to undo a fault may be killed. What it has left is then undone by ``hpcft chaos --undo RUN``,
by what is written here alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_FOLDER = "chaos"


@dataclass(frozen=True)
class Note:
    """Of one fault.

    kind: which.
    host: where it was done.
    how: what is needed to undo it, as the kind has it.
    """

    kind: str
    host: str
    how: dict[str, Any]


def write(run_dir: Path, note: Note) -> Path:
    """Write one down, so that it outlives this process.

    Raises
    ------
    OSError: it cannot be written.
    """
    folder = run_dir / _FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"{note.kind}-{secrets.token_hex(4)}.json"
    aside = path.with_suffix(".new")
    with aside.open("w") as file:
        json.dump(asdict(note), file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


def remove(path: Path) -> None:
    """It is undone."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()


def left(run_dir: Path) -> Iterator[tuple[Path, Note]]:
    """Those that there are."""
    for path in sorted((run_dir / _FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield path, Note(**json.loads(path.read_text()))
