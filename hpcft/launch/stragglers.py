"""Finding the ranks that are slow while they train, and having spares change places with them.

All shepherds hear the same notes and judge alike (:mod:`hpcft.launch.judge`); the one that speaks
for all says who is slow, and who is no longer. Who is slow is under suspicion: as a spare it comes
last. With ``--replace-stragglers`` the speaker has slow ranks change places with spares at a step's
end (:mod:`hpcft.world.departure`). A slow rank that was made a spare is asked now and then how long
a step takes it, and trusted again when that is as long as it takes the others.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import asdict, dataclass

from hpcft.launch.channel import Message
from hpcft.launch.chronicle import Chronicle
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet
from hpcft.launch.judge import Evidence, Judge, Laps, Note
from hpcft.telemetry.events import Event
from hpcft.telemetry.outliers import PASSABLE
from hpcft.world.departure import LEAVE, RESIZE, replacing

#: Seconds between two replacements; and between two of the same logical rank, for if whoever plays
#: it is slow it is the work.
_REST, _SAME_RANK = 60.0, 600.0
#: Seconds until a slow rank that was made a spare is tried first, doubled with each time that it
#: has not passed or was found slow; and at most.
_FIRST_PROBE, _LAST_PROBE = 5.0, 300.0
#: Trials in a row that must have gone well.
_PROBES = 2


@dataclass(frozen=True)
class Former:
    """A replacement that was ordered.

    at: when; seconds since 1970.
    logicals: the logical ranks concerned.
    """

    at: float
    logicals: frozenset[int]


def choose(
    slow: Mapping[int, tuple[int, float]], trusted: int, former: Iterable[Former], now: float
) -> list[int]:
    """Who is to change places with a spare now, by world rank.

    Parameters
    ----------
    slow: of those that train and are slow, the logical rank, and how many times as long they take.
    trusted: how many spares there are that are not under suspicion.
    """
    former = list(former)
    if any(now - one.at < _REST for one in former):
        return []
    lately = {rank for one in former if now - one.at < _SAME_RANK for rank in one.logicals}
    worst = sorted(slow, key=lambda world: -slow[world][1])
    return [world for world in worst if slow[world][0] not in lately][:trusted]


class Stragglers:
    """One shepherd's part.

    Parameters
    ----------
    fleet: the shepherds.
    crew: who trains.
    chronicle: writes down what is found.
    tell: sends a message to the shepherd's rank.
    replace: whether slow ranks are to be replaced.
    """

    def __init__(
        self,
        fleet: Fleet,
        crew: Crew,
        chronicle: Chronicle,
        tell: Callable[[Message], None],
        replace: bool,
    ) -> None:
        self._fleet = fleet
        self._crew = crew
        self._chronicle = chronicle
        self._tell = tell
        self._replace = replace
        self._laps = Laps(len(fleet.hosts))
        self._judge = Judge()
        #: The last of each process.
        self._notes: dict[int, Note] = {}
        self._passed: Counter[int] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._patience = 0.0

    @property
    def slow(self) -> set[int]:
        """Who is under suspicion, by world rank."""
        return {rank for rank, fact in self._fleet.said("slow").items() if fact["slow"]}

    @property
    def step(self) -> int:
        """The last of which some rank has told how long it took."""
        return max((note.step for note in self._notes.values()), default=0)

    # -- this shepherd's rank ------------------------------------------------------------------

    def lapped(self, lap: Message) -> None:
        """The rank has ended a lap."""
        if note := self._laps.add(self._fleet.rank, lap):
            self._fleet.proclaim(kind="pace", **asdict(note))

    def probed(self, seconds: float) -> None:
        """The rank, which is a spare, has found out how long a step takes it."""
        self._announce("probed", self._fleet.rank, seconds=seconds)

    def renew(self) -> None:
        """Others train now."""
        self._look_after_own()

    def cancel(self) -> None:
        """The launch is over."""
        if self._timer:
            self._timer.cancel()

    def _look_after_own(self) -> None:
        """Have the rank tried, if it is a spare for being slow."""
        parked = self._fleet.rank in self.slow - self._crew.active
        if parked and self._timer is None:
            found = (self._fleet.said("slow")[self._fleet.rank]["serial"] + 1) // 2
            self._patience = min(_FIRST_PROBE * 2 ** (found - 1), _LAST_PROBE)
            self._wait()
        elif not parked and self._timer:
            self._timer.cancel()
            self._timer = None

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._patience, self._probe)

    def _probe(self) -> None:
        self._tell({"kind": "probe"})
        if not self._passed[self._fleet.rank]:
            self._patience = min(2 * self._patience, _LAST_PROBE)
        self._wait()

    # -- all ranks -----------------------------------------------------------------------------

    def noted(self, message: Message) -> None:
        """Some rank says how long its steps take it."""
        note = Note.of(message)
        self._notes[note.world] = note
        changed = self._judge.heard(note, self._crew.active, self._crew.epoch, self.slow)
        for evidence in changed if self._fleet.speaks else ():
            self._judged(evidence)
        self._consider()

    def heard(self, fact: Message) -> None:
        """Something has become known of a rank that is slow, or was."""
        if fact["fact"] == "probed":
            self._tried(fact["rank"], fact["seconds"])
        else:
            self._passed.pop(fact["rank"], None)
            if fact["rank"] == self._fleet.rank:
                self._tell({"kind": "slow", "slow": fact["slow"]})
                self._look_after_own()

    def _announce(self, kind: str, world: int, **detail: object) -> None:
        known = self._fleet.said(kind).get(world)
        serial = (known["serial"] if known else 0) + 1
        self._fleet.announce(kind, world, serial=serial, **detail)

    def _judged(self, evidence: Evidence) -> None:
        standing, world = evidence.standing, evidence.world
        host = self._fleet.hosts[world]
        detail = {
            "world": world,
            "host": host,
            "compute_s": round(standing.value, 6),
            "others_s": round(standing.others, 6),
            "factor": round(standing.factor, 3),
            "score": round(standing.score, 1),
            "waiting_s": round(evidence.waiting, 6),
            "others_waiting_s": round(evidence.others_waiting, 6),
            "since": round(evidence.since, 3),
        }
        self._announce("slow", world, slow=evidence.slow, factor=standing.factor)
        kind = "straggler" if evidence.slow else "straggler over"
        who = f"rank {evidence.logical} (process {world} on {host})"
        if evidence.slow:
            text = (
                f"{who} is slow: it computes {_ms(standing.value)} in a step, the others "
                f"{_ms(standing.others)}, and wait {_ms(evidence.others_waiting)}"
            )
        else:
            text = f"{who} is as fast as the others again: {_ms(standing.value)} in a step"
        event = Event(
            kind, evidence.step, (evidence.logical,), epoch=self._crew.epoch, detail=detail
        )
        self._chronicle.note(event, text)

    def _tried(self, world: int, seconds: float) -> None:
        """A spare that is under suspicion has tried a few steps."""
        others = self._judge.others
        if world not in self.slow - self._crew.active or others is None:
            return
        if seconds > PASSABLE * others:
            self._passed.pop(world, None)
            return
        self._passed[world] += 1
        if self._passed[world] < _PROBES or not self._fleet.speaks:
            return
        host = self._fleet.hosts[world]
        detail = {
            "world": world,
            "host": host,
            "compute_s": round(seconds, 6),
            "others_s": round(others, 6),
        }
        self._announce("slow", world, slow=False, factor=seconds / others)
        text = f"spare {world} on {host} is as fast as the others again: {_ms(seconds)} in a step"
        event = Event("straggler over", self.step, epoch=self._crew.epoch, detail=detail)
        self._chronicle.note(event, text)

    def _consider(self) -> None:
        """Have ranks replaced, if it is time for that."""
        slow = self.slow
        if not (self._replace and slow & self._crew.active and self._fleet.speaks):
            return
        known, epoch = self._fleet.known, self._crew.epoch
        if known(replacing(epoch)) or known(LEAVE) or known(RESIZE):
            return
        verdicts = self._fleet.said("slow")
        candidates = {
            world: (note.logical, float(verdicts[world]["factor"]))
            for world, note in self._notes.items()
            if world in slow & self._crew.active and note.epoch == epoch
        }
        now = time.time()
        chosen = choose(candidates, len(self._trusted(slow)), self._former(), now)
        if chosen:
            logicals = sorted(candidates[world][0] for world in chosen)
            self._fleet.announce(replacing(epoch), 0, worlds=chosen, logicals=logicals, at=now)

    def _trusted(self, slow: Set[int]) -> set[int]:
        return self._fleet.standing() - self._fleet.known("dead") - self._crew.active - slow

    def _former(self) -> list[Former]:
        prefix = replacing(0).rpartition("0")[0]
        return [
            Former(fact["at"], frozenset(fact["logicals"]))
            for fact in self._fleet.facts()
            if fact["fact"].startswith(prefix)
        ]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
