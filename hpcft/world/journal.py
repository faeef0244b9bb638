"""The run's story, written down by whoever is logical rank 0."""

from __future__ import annotations

import time
from typing import Any

from hpcft.telemetry.events import Event, Times
from hpcft.telemetry.events import failure as failure_event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.world.link import Failure
from hpcft.world.membership import Membership
from hpcft.world.recovery import Recovered, World


class Journal:
    """Keeps ``ranks.json``, ``events.jsonl`` and ``summary.json``.

    Every process keeps what it has seen; logical rank 0 writes it. Should that one die before it
    has written, its successor finds out from the file what is missing and adds it.

    Parameters
    ----------
    pids: process number of every world rank.
    """

    def __init__(self, rundir: RunDirectory, world: World, pids: dict[int, int]) -> None:
        self._rundir = rundir
        self._world = world
        self._pids = pids
        self._unwritten: dict[int, list[Event]] = {}
        self._stalled_since: float | None = None

    @property
    def _writes(self) -> bool:
        return self._world.logical == 0

    def started(self) -> None:
        """Training begins."""
        if self._writes:
            membership = self._world.membership
            detail = {"active": len(membership.active), "spares": len(membership.spares)}
            ranks = tuple(range(len(membership.active)))
            self._rundir.append([Event("start", 0, ranks, detail=detail)])
            self._write_ranks()

    def recovered(self, recovery: Recovered, failures: dict[int, Failure]) -> None:
        """The world has healed.

        Parameters
        ----------
        failures: what the shepherds said, by world rank.
        """
        healing = recovery.healing
        before, after = healing.before, healing.after
        step = recovery.transfer.step
        events: list[Event] = []

        def add(kind: str, ranks: tuple[int, ...], at: float, **detail: Any) -> None:
            events.append(Event(kind, step, ranks, after.epoch, at, detail))

        first = recovery.began
        for world in (*(before.active[r] for r in healing.failed), *healing.spares_lost):
            failure = failures.get(world) or Failure(world, "unknown", first, first)
            logical = before.logical(world)
            times = Times(failure.at, failure.known)
            host = self._world.hosts[world]
            events.append(
                failure_event(step, after.epoch, logical, world, host, failure.cause, times)
            )
            add("detection", () if logical is None else (logical,), failure.known, world=world)
            if logical is not None:
                first = min(first, failure.at)
        self._stalled_since = first
        for adoption in healing.adoptions:
            add(
                "adoption",
                (adoption.logical,),
                recovery.ended,
                world=adoption.world,
                host=self._world.hosts[adoption.world],
            )
        if healing.dropped:
            sizes = {"from": len(before.active), "to": len(after.active)}
            add("shrink", healing.dropped, recovery.ended, **sizes)
        add(
            "resume",
            tuple(range(len(after.active))),
            recovery.ended,
            action=healing.action,
            active=len(after.active),
            spares=len(after.spares),
            recover_s=round(recovery.ended - recovery.began, 6),
            lost_steps=recovery.transfer.newest - step,
            attempts=recovery.attempts,
            phases={name: round(seconds, 6) for name, seconds in recovery.phases.items()},
        )
        self._unwritten[after.epoch] = events
        if self._writes:
            self._catch_up()
            self._write_ranks()

    def stepped(self, step: int) -> None:
        """A step has been completed. Cheap unless it is the first after a recovery."""
        if self._stalled_since is None:
            return
        stall = time.time() - self._stalled_since
        self._stalled_since = None
        if self._writes:
            epoch = self._world.membership.epoch
            detail = {"stall_s": round(stall, 6)}
            self._rundir.append([Event("recovered", step, (), epoch, detail=detail)])

    def finished(self, step: int, digest: str | None) -> None:
        """All ranks have agreed that training is over."""
        if self._writes:
            detail = {"params_sha256": digest}
            epoch = self._world.membership.epoch
            self._rundir.append([Event("finish", step, (), epoch, detail=detail)])
            self._rundir.write_summary(summarise(self._rundir.events()))

    def _catch_up(self) -> None:
        written = {e.epoch for e in self._rundir.events() if e.kind == "resume"}
        for epoch in sorted(self._unwritten.keys() - written):
            self._rundir.append(self._unwritten[epoch])
        self._unwritten.clear()

    def _write_ranks(self) -> None:
        membership = self._world.membership
        self._rundir.write_ranks(
            {
                "epoch": membership.epoch,
                "ranks": [self._entry(membership, world) for world in membership.active]
                + [self._entry(membership, world) for world in membership.spares],
            }
        )

    def _entry(self, membership: Membership, world: int) -> dict[str, Any]:
        logical = membership.logical(world)
        return {
            "logical": logical,
            "world": world,
            "host": self._world.hosts[world],
            "pid": self._pids[world],
            "role": "spare" if logical is None else "active",
        }
