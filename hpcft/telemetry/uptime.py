"""How long nodes have worked, and what ended that: what failure rates are estimated from.

A run's events become :class:`Stretch` es, one a node and failure. They are kept in the site's
history, a file of JSON lines to which each run adds its own at its end:

    {"version": 1, "run": "17.0", "node": "n3", "begin": 1795357887.9, "end": 1795361000.2,
     "failed": true, "kind": "memory", "cause": "out of memory: killed by the kernel (SIGKILL)"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpcft.telemetry.events import Event

#: What is to blame: the node as a whole, memory, a crash of the process by itself, no progress,
#: nobody knows what; or the script, or somebody outside, for neither of which a node is.
Kind = Literal["node", "memory", "crash", "stuck", "unknown", "script", "outside"]
BLAMED: tuple[Kind, ...] = ("node", "memory", "crash", "stuck", "unknown")
#: The environment variable that names the site's history.
HISTORY = "HPCFT_HISTORY"

_VERSION = 1
#: Failures on a node within so many seconds are one: its ranks die one after the other.
_TOGETHER = 30.0
_CRASHES = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE", "SIGSYS", "SIGTRAP")


@dataclass(frozen=True)
class Stretch:
    """A node worked from ``begin`` to ``end``, and then failed or was not watched any longer.

    run: the name of the run that saw it, or what else did.
    begin, end: seconds since 1970.
    failed: whether a failure ended it for which the node may be to blame.
    kind, cause: of what ended it; empty if nothing did.
    """

    run: str
    node: str
    begin: float
    end: float
    failed: bool
    kind: Kind | Literal[""] = ""
    cause: str = ""

    @property
    def hours(self) -> float:
        return max(0.0, self.end - self.begin) / 3600


def kind_of(cause: str) -> Kind:
    """Who is to blame, by the words that a failure's event has for its cause.

    A process that got SIGKILL without the kernel's being out of memory was killed by somebody.
    """
    if cause.startswith("out of memory"):
        return "memory"
    if cause.startswith("stuck"):
        return "stuck"
    if cause.startswith("node ") or cause == "its shepherd died":
        return "node"
    if any(name in cause for name in _CRASHES):
        return "crash"
    if cause in ("", "unknown"):
        return "unknown"
    if cause.startswith("exit code"):
        return "script"
    return "outside"


def stretches(
    run: str,
    events: Sequence[Event],
    ranks: Sequence[Mapping[str, Any]],
    begin: float,
    end: float,
) -> list[Stretch]:
    """Of a run, or a part of one.

    Parameters
    ----------
    ranks: the entries of ranks.json, which name the nodes.
    begin, end: of the run; seconds since 1970.
    """
    failures: dict[str, list[Event]] = {str(entry["host"]): [] for entry in ranks}
    for event in events:
        if event.kind == "failure" and event.detail.get("host"):
            failures.setdefault(str(event.detail["host"]), []).append(event)
    found: list[Stretch] = []
    for node, own in failures.items():
        since, lost = begin, False
        for event in sorted(own, key=lambda event: event.time):
            cause = str(event.detail.get("cause") or "")
            kind = kind_of(cause)
            if lost or event.time - since < (_TOGETHER if since > begin else 0.0):
                continue
            at = min(max(event.time, since), end)
            found.append(Stretch(run, node, since, at, kind in BLAMED, kind, cause))
            # A node that is gone is watched by nobody; any other works on.
            since, lost = at, kind == "node"
        if not lost:
            found.append(Stretch(run, node, since, end, False))
    return [stretch for stretch in found if stretch.end > stretch.begin or stretch.failed]


def append(path: Path, found: Sequence[Stretch]) -> None:
    """Add to a history, in one write, so that runs that end together do not mix their lines.

    Raises
    ------
    OSError: it cannot be written.
    """
    lines = (json.dumps({"version": _VERSION, **asdict(one)}) + "\n" for one in found)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(fd, "".join(lines).encode())
    finally:
        os.close(fd)


def read(path: Path) -> Iterator[Stretch | None]:
    """Those in a history, line by line; None for a line that is torn or of another version.

    Raises
    ------
    OSError: it cannot be read.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.strip():
                yield _stretch(line)


def _stretch(line: str) -> Stretch | None:
    try:
        known = json.loads(line)
        if known.pop("version") != _VERSION:
            return None
        begin, end = float(known.pop("begin")), float(known.pop("end"))
        if not 0 <= begin <= end < 1e12 or not isinstance(known["failed"], bool):
            return None
        return Stretch(begin=begin, end=end, **known)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
