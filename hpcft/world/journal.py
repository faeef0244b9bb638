"""The run's story, written down by whoever is logical rank 0."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from hpcft.telemetry.events import Event, Times
from hpcft.telemetry.events import failure as failure_event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.world.link import Failure
from hpcft.world.membership import Membership
from hpcft.world.recovery import Recovered, World

#: Seconds after a recovery within which the causes become known.
_PATIENCE = 1.0


@dataclass
class _Story:
    """A recovery, and the first step completed after it: its number and time."""

    recovery: Recovered
    stepped: tuple[int, float] | None = None


class Journal:
    """Keeps ``ranks.json``, ``events.jsonl`` and ``summary.json``.

    Every process keeps what it has seen; logical rank 0 writes it, after the first step that
    follows a recovery, for the others wait for that step and not for a file. Should it die before
    it has written, its successor finds out from the file what is missing and adds it.

    Parameters
    ----------
    pids: process number of every world rank.
    """

    def __init__(self, rundir: RunDirectory, world: World, pids: dict[int, int]) -> None:
        self._rundir = rundir
        self._world = world
        self._pids = pids
        self._untold: list[_Story] = []
        self._unwritten: dict[int, list[Event]] = {}

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

    def recovered(self, recovery: Recovered) -> None:
        """The world has healed. Told when there is time for it, and the causes are known."""
        self._untold.append(_Story(recovery))
        if self._writes:
            self._write_ranks()

    def stepped(self, step: int) -> list[Recovered]:
        """A step has been completed. Cheap unless a recovery is still to be told.

        Returns
        -------
        The recoveries that have been told now.
        """
        if not self._untold:
            return []
        last = self._untold[-1]
        if last.stepped is None:
            last.stepped = step, time.time()
        return self.tell()

    def tell(self, patience: float = _PATIENCE) -> list[Recovered]:
        """Write down the recoveries not told yet, if the causes of all failures are known.

        Parameters
        ----------
        patience: seconds after a recovery to wait for causes; after that it is told without.

        Returns
        -------
        The recoveries that have been told now.
        """
        for story in self._untold:
            unknown = any(
                not self._failure(world, 0).cause for world in story.recovery.healing.dead
            )
            if unknown and time.time() - story.recovery.ended < patience:
                return []
        for story in self._untold:
            self._unwritten[story.recovery.healing.after.epoch] = self._events(story)
        if self._writes and self._unwritten:
            self._catch_up()
        told = [story.recovery for story in self._untold]
        self._untold.clear()
        return told

    def note(self, kind: str, step: int, detail: dict[str, Any]) -> None:
        """Write down an event of a checkpoint; from any thread."""
        self._rundir.append([Event(kind, step, (), self._world.membership.epoch, detail=detail)])

    def finished(self, step: int, digest: str | None) -> None:
        """All ranks have agreed that training is over, and all is told."""
        if self._writes:
            detail = {"params_sha256": digest}
            epoch = self._world.membership.epoch
            self._rundir.append([Event("finish", step, (), epoch, detail=detail)])
            self._rundir.write_summary(summarise(self._rundir.events()))

    def _failure(self, world: int, otherwise: float) -> Failure:
        link = self._world.link
        known = link.failures.get(world) if link else None
        return known or Failure(world, "", otherwise, otherwise)

    def _events(self, story: _Story) -> list[Event]:
        recovery, healing = story.recovery, story.recovery.healing
        before, after = healing.before, healing.after
        step = max(0, recovery.transfer.step)
        newest = recovery.transfer.newest
        events: list[Event] = []

        def add(kind: str, ranks: tuple[int, ...], at: float, **detail: Any) -> None:
            events.append(Event(kind, step, ranks, after.epoch, at, detail))

        first = recovery.began
        for world in healing.dead:
            failure = self._failure(world, recovery.began)
            logical = before.logical(world)
            times = Times(failure.at, failure.known)
            host, cause = self._world.hosts[world], failure.cause or "unknown"
            events.append(failure_event(step, after.epoch, logical, world, host, cause, times))
            add("detection", () if logical is None else (logical,), failure.known, world=world)
            if logical is not None:
                first = min(first, failure.at)
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
            # Unknown, if those who knew are all dead.
            lost_steps=newest - step if newest >= 0 else None,
            attempts=recovery.attempts,
            phases={name: round(seconds, 6) for name, seconds in recovery.phases.items()},
        )
        if story.stepped:
            done, at = story.stepped
            stall = {"stall_s": round(at - first, 6)}
            events.append(Event("recovered", done, (), after.epoch, at, stall))
        return events

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
