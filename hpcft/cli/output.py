"""How the sub-commands speak."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hpcft.errors import HpcftError


def print_json(rows: list[dict[str, Any]]) -> None:
    """Each as a line."""
    for row in rows:
        print(json.dumps(row), flush=True)


def write_whole(path: Path, text: str, remedy: str = "") -> None:
    """Write a file as a whole or not at all: a reader sees the old one or the new one.

    Parameters
    ----------
    remedy: said if it cannot be written.

    Raises
    ------
    HpcftError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise HpcftError(f"{path} cannot be written: {error.strerror or error}", remedy) from error


def say(what: RenderableType) -> None:
    """A table or a text."""
    # Not cut to some width where nobody looks at it.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, highlight=False, markup=False, soft_wrap=isinstance(what, str)).print(what)


def amount(count: int) -> str:
    """Bytes, for people."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def terminal_size() -> tuple[int, int] | None:
    """Columns and lines of the terminal stdout is; None if it is none."""
    if not sys.stdout.isatty():
        return None
    size = Console().size
    return size.width, size.height


@dataclass(frozen=True)
class Column:
    """A column of a table.

    dispensable: the higher, the sooner it is left out where there is no room; 0: never.
    """

    title: str
    cells: Sequence[str]
    dispensable: int = 0

    @property
    def width(self) -> int:
        return max(map(len, (self.title, *self.cells))) + 3


def table(columns: Sequence[Column]) -> Table:
    """A table of as many of the columns as the terminal has room for."""
    size = terminal_size()
    shown = list(columns)
    while size and sum(column.width for column in shown) + 1 > size[0]:
        least = max(shown, key=lambda column: column.dispensable)
        if not least.dispensable:
            break
        shown.remove(least)
    made = Table()
    for column in shown:
        made.add_column(column.title, no_wrap=True, overflow="ellipsis")
    for row in zip(*(column.cells for column in shown), strict=True):
        made.add_row(*row)
    return made


@contextmanager
def bar(title: str, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, at a terminal; told the bytes moved, and those in all."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda moved, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TransferSpeedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(title)
        yield lambda moved, total: progress.update(task, completed=moved, total=total)
