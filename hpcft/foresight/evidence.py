"""What is on record of each node, put together from all that has seen it.

Sources overlap: two runs share a node, a run is in the history as well, Slurm has seen what a run
has seen. So a node's watched time is the union of what each has watched, and failures that are
told within some minutes of each other are one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.foresight.rates import Seen
from hpcft.slurm.naming import names_before
from hpcft.slurm.records import Outage
from hpcft.telemetry import events as log
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.uptime import Kind, Stretch, stretches

#: Seconds within which failures of a node are one: Slurm notices a loss some minutes later.
_SAME = 600.0


@dataclass(frozen=True)
class Record:
    """A node's.

    hours: how long it was watched while it worked.
    times: hours from the begin of a watch, or from a failure, to what ended that; and whether that
        was a failure.
    causes: of its failures, most frequent first.
    spared: ends for which the node was not to blame, by their causes.
    """

    node: str
    hours: float
    times: tuple[tuple[float, bool], ...]
    causes: tuple[tuple[str, int], ...]
    spared: tuple[tuple[str, int], ...]

    @property
    def failures(self) -> int:
        return sum(failed for _, failed in self.times)

    @property
    def seen(self) -> Seen:
        return Seen(self.node, self.failures, self.hours)


def of_run(name: str, path: Path, begun: float | None, live: float | None) -> list[Stretch]:
    """What a run has seen of its nodes, before restarts by Slurm too.

    Parameters
    ----------
    path: its (last) directory.
    begun: when its launcher began; None if nobody knows. Seconds since 1970, as is ``live``.
    live: now, if it still runs; None if it does not, or nobody can tell.

    Raises
    ------
    OSError, ValueError, LookupError, TypeError: it cannot be read.
    """
    found: list[Stretch] = []
    for place in [*(path.with_name(before) for before in names_before(path.name)), path]:
        rundir, last = RunDirectory(place), place == path
        failures = log.skim(rundir.events_file, "failure")
        times = [event.time for event in failures]
        status = rundir.status()
        heard = [*times, *([float(status["time"])] if status else [])]
        if last:
            times += [] if begun is None else [begun]
            heard += [] if live is None else [live]
        if times and heard:
            begin = min(times)
            found += stretches(name, failures, rundir.ranks(), begin, max(begin, *heard))
    return found


def of_slurm(
    nodes: Iterable[str], outages: Sequence[Outage], since: float, now: float
) -> list[Stretch]:
    """What Slurm has seen of nodes from some time on."""
    found = []
    for node in nodes:
        at: float | None = since
        for outage in sorted(outages, key=lambda outage: outage.begin):
            if outage.node != node:
                continue
            if at is not None and outage.begin > at:
                failed = not outage.planned
                cause = f"{outage.state}: {outage.reason}".rstrip(": ")
                kind: Kind = "node" if failed else "outside"
                found.append(Stretch("Slurm", node, at, outage.begin, failed, kind, cause))
            if outage.end is None:
                at = None
                break
            at = max(outage.end, at or since)
        if at is not None and now > at:
            found.append(Stretch("Slurm", node, at, now, False))
    return found


def records(found: Iterable[Stretch]) -> list[Record]:
    """Of each node, by name."""
    by_node: dict[str, list[Stretch]] = {}
    for stretch in found:
        by_node.setdefault(stretch.node, []).append(stretch)
    return [_record(node, own) for node, own in sorted(by_node.items())]


def _record(node: str, own: Sequence[Stretch]) -> Record:
    watched: list[list[float]] = []
    for stretch in sorted(own, key=lambda one: one.begin):
        if watched and stretch.begin <= watched[-1][1]:
            watched[-1][1] = max(watched[-1][1], stretch.end)
        else:
            watched.append([stretch.begin, stretch.end])
    failures: list[Stretch] = []
    spared: Counter[str] = Counter()
    for stretch in sorted(own, key=lambda one: one.end):
        if not stretch.failed:
            spared[stretch.cause] += bool(stretch.cause)
        elif not failures or stretch.end - failures[-1].end > _SAME:
            failures.append(stretch)
    times: list[tuple[float, bool]] = []
    left = [failure.end for failure in failures]
    for begin, end in watched:
        at = begin
        while left and left[0] <= end:
            failed_at = left.pop(0)
            times.append(((failed_at - at) / 3600, True))
            at = failed_at
        if end > at:
            times.append(((end - at) / 3600, False))
    causes = Counter(failure.cause or failure.kind for failure in failures)
    hours = sum(end - begin for begin, end in watched) / 3600
    return Record(
        node,
        hours,
        tuple(times),
        tuple(causes.most_common()),
        tuple((+spared).most_common()),
    )
