"""The run's story, written down by whoever is logical rank 0."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from hpcft.telemetry.beginnings import size_at
from hpcft.telemetry.events import Event, Times
from hpcft.telemetry.events import failure as failure_event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.world.link import Failure
from hpcft.world.membership import Membership
from hpcft.world.recovery import Recovered, World

#: Seconds after a recovery within which the causes become known: much memory is long in being given
#: back, and before that a process has not ended.
_PATIENCE = 5.0


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
    restarts: how often the Slurm job was requeued before.
    """

    def __init__(
        self, rundir: RunDirectory, world: World, pids: dict[int, int], restarts: int
    ) -> None:
        self._rundir = rundir
        self._world = world
        self._pids = pids
        self._restarts = restarts
        self._untold: list[_Story] = []
        self._unwritten: dict[int, list[Event]] = {}
        #: Spares of the present membership that have died; written down already.
        self._lost_spares: set[int] = set()

    @property
    def _writes(self) -> bool:
        return self._world.logical == 0

    def started(self) -> None:
        """Training begins; said once, however often the script is run."""
        if self._writes and not any(e.kind == "start" for e in self._rundir.launch_events()):
            launched = self._world.launched
            detail = {
                "active": len(launched.active),
                "spares": len(launched.spares),
                "restarts": self._restarts,
            }
            ranks = tuple(range(len(launched.active)))
            # Who has read of the start finds the ranks that have started.
            self._write_ranks()
            self._rundir.append([Event("start", 0, ranks, detail=detail)])

    def launched_again_for(self) -> str:
        """Why the ranks were launched again; empty in the first launch."""
        former = self._rundir.former_events()
        return str(former[-1].detail["reason"]) if former else ""

    def recovered(self, recovery: Recovered) -> None:
        """The world has healed. Told when there is time for it, and the causes are known."""
        self._untold.append(_Story(recovery))
        if self._writes:
            self._write_ranks()

    def restored(self, step: int) -> None:
        """The script, which has been run anew after recoveries, goes on from ``step``."""
        now = time.time()
        for story in self._untold:
            recovery = story.recovery
            plan = recovery.transfer
            if plan.anew and plan.step < 0:
                # Of several in a row the first has cost the steps; then nobody had come further.
                newest = max(plan.newest, step) if plan.newest >= 0 else -1
                recovery.transfer = replace(plan, step=step, newest=newest)
                recovery.phases["script_s"] = now - recovery.ended
                recovery.ended = now

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

    def spares_lost(self, step: int, patience: float = _PATIENCE) -> list[Failure]:
        """Write down the deaths of spares that no recovery has come upon. Cheap if there are none.

        Parameters
        ----------
        step: completed.
        patience: seconds after a death to wait for its cause.

        Returns
        -------
        Those that have been written down now.
        """
        link, membership = self._world.link, self._world.membership
        # What a recovery has come upon is told first, for it says how many spares it has left.
        if not (self._writes and link and link.failures) or self._untold:
            return []
        lost = [
            link.failures[world]
            for world in membership.spares
            if world in link.failures and world not in self._lost_spares
        ]
        now = time.time()
        lost = [known for known in lost if known.cause or now - known.known >= patience]
        for known in lost:
            self._lost_spares.add(known.rank)
            self._rundir.append(self._failed(step, membership, known))
        if lost:
            self._write_ranks()
        return lost

    def note(self, kind: str, step: int, detail: dict[str, Any]) -> None:
        """Write down an event of a checkpoint; from any thread."""
        self._rundir.append([Event(kind, step, (), self._world.membership.epoch, detail=detail)])

    def saved_by(self, step: int) -> int:
        """How many ranks trained when the newest checkpoint, of ``step``, was saved.

        Of a checkpoint of another run that is not known; it counts as one of as many as launched.
        """
        # By epoch, the step it has begun at and its size. A checkpoint is of the last epoch that
        # has begun before it: what was newer when an epoch began was no good, or it would have
        # been restored.
        known = {
            e.epoch: (e.step, e.detail["active"])
            for e in self._rundir.launch_events()
            if e.kind == "resume"
        }
        for story in self._untold:
            after, begun = story.recovery.healing.after, story.recovery.transfer.step
            if begun >= 0:
                known[after.epoch] = (begun, len(after.active))
        sizes = (known[epoch] for epoch in sorted(known, reverse=True))
        size = next((size for begun, size in sizes if begun < step), None)
        former = size or size_at(self._rundir.former_events(), step)
        return former or len(self._world.launched.active)

    def finished(self, step: int, digest: str | None) -> None:
        """All ranks have agreed that training is over, and all is told."""
        self._end(Event("finish", step, detail={"params_sha256": digest}))

    def interrupted(self, step: int, reason: str, newest: int) -> None:
        """All ranks have agreed to leave before training is over, and all is told.

        Parameters
        ----------
        newest: the step of the newest checkpoint; -1 for none.
        """
        self._end(Event("interrupted", step, detail={"reason": reason, "newest": newest}))

    def _end(self, event: Event) -> None:
        if self._writes:
            self._rundir.append([replace(event, epoch=self._world.membership.epoch)])
            self._rundir.write_summary(summarise(self._rundir.events()))

    def _failure(self, world: int, otherwise: float) -> Failure:
        link = self._world.link
        known = link.failures.get(world) if link else None
        return known or Failure(world, "", otherwise, otherwise)

    def _failed(
        self, step: int, membership: Membership, failure: Failure, logical: int | None = None
    ) -> list[Event]:
        """A process has failed, and the others know it."""
        world, epoch = failure.rank, membership.epoch
        host, cause = self._world.hosts[world], failure.cause or "unknown"
        times = Times(failure.at, failure.known)
        ranks = () if logical is None else (logical,)
        return [
            failure_event(step, epoch, logical, world, host, cause, times),
            Event("detection", step, ranks, epoch, failure.known, {"world": world}),
        ]

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
            failure, logical = self._failure(world, recovery.began), before.logical(world)
            events += self._failed(step, after, failure, logical)
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
        for one in healing.replaced:
            add(
                "replaced",
                (one.logical,),
                recovery.ended,
                world=one.world,
                host=self._world.hosts[one.world],
                slow_world=one.failed,
                slow_host=self._world.hosts[one.failed],
                seconds=round(recovery.ended - recovery.began, 6),
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
            # Unknown, if those who knew are all dead, or the run has ended before it was restored.
            lost_steps=newest - step if newest >= 0 and recovery.transfer.step >= 0 else None,
            attempts=recovery.attempts,
            phases={name: round(seconds, 6) for name, seconds in recovery.phases.items()},
        )
        if story.stepped:
            done, at = story.stepped
            stall = {"stall_s": round(at - first, 6)}
            events.append(Event("recovered", done, (), after.epoch, at, stall))
        return events

    def _catch_up(self) -> None:
        known = self._rundir.launch_events()
        written = {e.epoch for e in known if e.kind == "resume"}
        # Spares whose death was told when no recovery was needed; the next comes upon it, too.
        told = {e.detail["world"] for e in known if e.kind == "failure"}
        for epoch in sorted(self._unwritten.keys() - written):
            self._rundir.append(
                [
                    event
                    for event in self._unwritten[epoch]
                    if event.kind not in ("failure", "detection")
                    or event.detail["world"] not in told
                ]
            )
        self._unwritten.clear()

    def _write_ranks(self) -> None:
        membership = self._world.membership
        self._rundir.write_ranks(
            {
                "epoch": membership.epoch,
                "ranks": [self._entry(membership, world) for world in membership.active]
                + [
                    self._entry(membership, world)
                    for world in membership.spares
                    if world not in self._lost_spares
                ],
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
