"""The control group this process is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_TOP = Path("/sys/fs/cgroup")


def memory_groups() -> Iterator[tuple[Path, bool]]:
    """The directories of the control groups that account for this process's memory.

    Yields
    ------
    The group's directory and whether it is cgroup v2's; the own group, then those above it.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        second = controllers == ""
        if second or "memory" in controllers.split(","):
            top = _TOP if second else _TOP / "memory"
            group = Path(path.lstrip("/"))
            yield from ((top / part, second) for part in (group, *group.parents))
