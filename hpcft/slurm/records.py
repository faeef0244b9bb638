"""What Slurm has on record of its nodes: when they were down, why, and which jobs that has ended.

Read from the tables that Slurm's commands print with ``--parsable2``, which are the same from
version to version; their JSON is not.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from hpcft.slurm.command import printed

#: Reasons that a person, or Slurm on a person's behalf, gives.
_PLANNED = re.compile(
    r"maint|(?<!unexpectedly )reboot|upgrad|update|test|schedul|planned|reserv|drain",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Outage:
    """A node did not serve.

    begin, end: seconds since 1970; the end is None while it lasts.
    planned: whether somebody had meant it to.
    """

    node: str
    begin: float
    end: float | None
    state: str
    reason: str
    planned: bool


@dataclass(frozen=True)
class Jobs:
    """All jobs' nodes together.

    node_hours: how long they ran, times how many they had.
    failed: how many jobs a node's failure has ended.
    """

    node_hours: float
    failed: int


def states() -> dict[str, tuple[str, str]]:
    """Of each node its state and the reason for that, empty if none; none if Slurm is not there."""
    return of_states(printed("sinfo", "--noheader", "--Node", "--format=%N|%T|%E"))


def of_states(text: str) -> dict[str, tuple[str, str]]:
    """Of what ``sinfo --Node --format=%N|%T|%E`` prints."""
    rows = (line.split("|", 2) for line in text.splitlines())
    found = {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}
    return {
        node: (state, "" if reason.lower() == "none" else reason)
        for node, (state, reason) in found.items()
    }


def outages(since: float) -> list[Outage] | None:
    """Of all nodes since a time; None where Slurm keeps no accounts."""
    columns = "format=NodeName,Start,End,State,Reason"
    start = time.strftime("start=%Y-%m-%dT%H:%M:%S", time.localtime(since))
    text = printed(
        "sacctmgr", "--noheader", "--parsable2", "show", "event", start, columns, complaints=True
    )
    return of_outages(text)


def of_outages(text: str) -> list[Outage] | None:
    """Of what ``sacctmgr --parsable2 show event`` prints of these columns."""
    found = []
    understood = not text.strip()
    for line in text.splitlines():
        row = line.split("|", 4)
        begin = _time(row[1]) if len(row) == 5 else None
        if begin is None:
            continue
        understood = True
        node, _, end, state, reason = row
        down = re.search(r"DOWN|FAIL|ERROR", state)
        if node and (down or "DRAIN" in state):
            planned = not down or bool(_PLANNED.search(reason))
            found.append(Outage(node, begin, _time(end), state, reason, planned))
    # Anything else is a complaint, such as that there is no accounting.
    return found if understood else None


def jobs(since: float) -> Jobs | None:
    """Of all users since a time; None where Slurm keeps no accounts."""
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    columns = "State,NNodes,ElapsedRaw"
    command = ("sacct", "--allusers", "--allocations", "--noheader", "--parsable2")
    return of_jobs(printed(*command, f"--starttime={start}", f"--format={columns}"))


def of_jobs(text: str) -> Jobs | None:
    """Of what ``sacct --parsable2 --format=State,NNodes,ElapsedRaw`` prints."""
    hours, failed, rows = 0.0, 0, 0
    for line in text.splitlines():
        row = line.split("|")
        if len(row) == 3 and row[1].isdigit() and row[2].isdigit():
            rows += 1
            hours += int(row[1]) * int(row[2]) / 3600
            failed += row[0].startswith("NODE_FAIL")
    return Jobs(hours, failed) if rows else None


def _time(text: str) -> float | None:
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
