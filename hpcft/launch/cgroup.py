"""The control groups that processes are in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")


def memory_groups() -> Iterator[tuple[Path, bool]]:
    """Those that account for this process's memory; as :func:`groups`."""
    yield from groups("memory", "self")


def groups(controller: str, process: int | str) -> Iterator[tuple[Path, bool]]:
    """The directories of a process's control groups of version 2, and of a controller of v1.

    Parameters
    ----------
    process: its number, or ``self``.

    Yields
    ------
    The group's directory and whether it is cgroup v2's; the own group, then those above it.
    """
    try:
        lines = Path(f"/proc/{process}/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        second = controllers == ""
        if second or controller in controllers.split(","):
            top = _TOP if second else _TOP / controller
            group = Path(path.lstrip("/"))
            yield from ((top / part, second) for part in (group, *group.parents))
