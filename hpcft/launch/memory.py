"""How much memory is left here, by the tightest of the limits that hold for this process.

Read from the kernel alone, which answers at once: the control groups of this process and those
above them (v2 and v1), and the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcft.launch.cgroup import memory_groups

#: Limits from here on are none: what v1 says in place of none.
_NONE = 1 << 60


@dataclass(frozen=True)
class Room:
    """What is left of a limit, in bytes.

    limit: how much there may be.
    free: how much of it can be had, with what the kernel would give up for it.
    where: whose limit it is, in words.
    """

    limit: int
    free: int
    where: str


def room() -> Room | None:
    """The least that is left of any limit; None if the kernel says nothing of memory."""
    rooms = [*in_groups(memory_groups()), *on_machine(Path("/proc/meminfo"))]
    return min(rooms, key=lambda room: room.free, default=None)


def in_groups(groups: Iterable[tuple[Path, bool]]) -> Iterator[Room]:
    """What is left in each of these control groups that has a limit.

    Parameters
    ----------
    groups: directories, and whether they are of cgroup v2.
    """
    for group, second in groups:
        limits = [_number(group / name) for name in _LIMITS[second]]
        limit = min((limit for limit in limits if limit is not None), default=_NONE)
        used = _number(group / _USED[second])
        if used is not None and limit < _NONE:
            # Of files' pages the kernel gives up those that nobody has used lately; of the others
            # it is reckoned, as MemAvailable is, that half are needed.
            total = "" if second else "total_"
            pages = _table(group / "memory.stat")
            files = pages.get(f"{total}inactive_file", 0) + pages.get(f"{total}active_file", 0) // 2
            yield Room(limit, max(0, limit - used + files), f"the control group {group}")


_LIMITS = {True: ("memory.max", "memory.high"), False: ("memory.limit_in_bytes",)}
_USED = {True: "memory.current", False: "memory.usage_in_bytes"}


def on_machine(meminfo: Path) -> Iterator[Room]:
    """What is left on the machine, by what the kernel says in ``/proc/meminfo``."""
    said = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(meminfo), re.MULTILINE))
    if "MemTotal" in said and "MemAvailable" in said:
        yield Room(int(said["MemTotal"]) << 10, int(said["MemAvailable"]) << 10, "the machine")


def pressure() -> float:
    """Per cent of the last ten seconds in which all processes waited for memory.

    Of the own control group, else of the machine; 0 if the kernel keeps no record of it.
    """
    groups = [group for group, second in memory_groups() if second]
    for file in (*(group / "memory.pressure" for group in groups[:1]), _PRESSURE):
        if found := re.search(r"^full avg10=([\d.]+)", _text(file), re.MULTILINE):
            return float(found[1])
    return 0.0


_PRESSURE = Path("/proc/pressure/memory")


def held(pid: int) -> int:
    """Bytes of memory of its own that a process has, with what it shares since it was forked."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", _text(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _table(file: Path) -> dict[str, int]:
    rows = (line.split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
