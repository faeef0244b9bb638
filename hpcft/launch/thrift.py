"""Giving memory up, on a machine where it becomes short, before the kernel kills anybody for it.

What is missed least is given up first: the evaluation beside a spare; then what the spare's script
has made, which the spare has to make again before it can train; then the copies that this machine
keeps of other nodes' checkpoints, without which the loss of such a node costs steps. Each shepherd
looks after its own rank; those of a machine read the same limits, and take turns by their ranks.

When there is enough again all comes back, in time: the copies with the next save.

Where that is too slow the kernel kills, and takes spares first (``oom_score_adj``).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore
from hpcft.launch import memory
from hpcft.launch.channel import Message
from hpcft.launch.child import Child
from hpcft.launch.chronicle import Chronicle
from hpcft.launch.courier import Courier
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet
from hpcft.launch.ration import Patience, Ration, Supply
from hpcft.telemetry.events import Event

#: Seconds between two looks: as long as there is plenty, and when memory is short or becomes so.
_LOOK, _CLOSE_LOOK = 0.5, 0.1
#: Seconds between what shepherds of one machine give up, for it takes time until that is seen.
_TURN = 0.5
#: Seconds in which a spare that was told to has given up what it can.
_REACTION = 0.5
#: The kernel's measure of who is killed first for memory: of spares, and of ranks that train.
_EXPENDABLE, _NEEDED = 900, 0


class Thrift:
    """One shepherd's part.

    Parameters
    ----------
    fleet: the shepherds.
    crew: who trains.
    child: this one's rank.
    tell: sends it a message.
    kill: ends it, for a cause, at a time (seconds since 1970).
    stores, courier: what this machine keeps of other nodes', and who takes that in.
    evaluate: has the spare's evaluator run, or not.
    chronicle: writes down what is given up.
    step: how far training is.
    coolable: a spare can let go of what its script has made.

    Attributes
    ----------
    short: memory is short here, or was a moment ago.
    """

    def __init__(
        self,
        fleet: Fleet,
        crew: Crew,
        child: Child,
        tell: Callable[[Message], None],
        kill: Callable[[str, float], None],
        stores: list[NearStore],
        courier: Courier,
        evaluate: Callable[[], None],
        chronicle: Chronicle,
        step: Callable[[], int],
        coolable: bool,
    ) -> None:
        self._fleet = fleet
        self._crew = crew
        self._child = child
        self._tell = tell
        self._kill = kill
        self._stores = stores
        self._courier = courier
        self._evaluate = evaluate
        self._chronicle = chronicle
        self._step = step
        self._coolable = coolable
        self.short = False
        self._ration = Ration()
        self._patience, self._spare_patience = Patience(), Patience()
        #: When the spare was told to be bare; None if it may be warm.
        self._told: float | None = None
        #: Whether it is, or the contrary; None while its script runs.
        self._bare: bool | None = None
        #: When there was still some memory; by a monotonic clock.
        self._last_since = 0.0
        #: Bytes it had before, and what it has given back.
        self._held = self._need = 0
        self._room: memory.Room | None = None
        #: What the rank has been told: whether there is no memory for a spare that is to train.
        self._tight = False
        self._without_copies = False
        self.renew()

    @property
    def _spares(self) -> list[int]:
        """Those of this machine, in the order in which they are given up."""
        here = self._fleet.here() - self._fleet.known("dead") - self._crew.active
        return sorted(here, reverse=True)

    @property
    def _warming(self) -> set[int]:
        """The spares of this machine that run their scripts again."""
        said = self._fleet.said("warming").items()
        return {rank for rank, fact in said if fact["warming"]} & self._fleet.here()

    @property
    def _now_held(self) -> int:
        """Bytes of memory that the rank's process has to itself."""
        pid = self._child.pid
        return 0 if pid is None else memory.held(pid)

    def _tell_all(self, warming: bool) -> None:
        """That this one does, if that is news."""
        rank = self._fleet.rank
        known = self._fleet.said("warming").get(rank)
        if warming != bool(known and known["warming"]):
            serial = known["serial"] + 1 if known else 0
            self._fleet.announce("warming", rank, warming=warming, serial=serial)

    def renew(self) -> None:
        """Others train now."""
        spare = self._fleet.rank not in self._crew.active
        for pid in self._child.family():
            # Where that is not allowed the kernel chooses as ever.
            with contextlib.suppress(OSError):
                score = _EXPENDABLE if spare else _NEEDED
                Path(f"/proc/{pid}/oom_score_adj").write_text(str(score))
        if not spare and self._told is not None:
            self._told = None
            self._tell({"kind": "warmth", "bare": False})
        if not spare:
            self._tell_all(False)
            self._bare, self._held, self._need = None, 0, 0

    async def keep(self) -> None:
        """Look after it, until cancelled."""
        while True:
            room = memory.room()
            if room is None:
                return
            self._room = room
            stalled, now = memory.pressure(), time.monotonic()
            supply = self._ration.look(room, stalled, now, bool(self._warming))
            self._tell_room(supply)
            if supply.short:
                self._give_up(supply)
            else:
                self._take_back(supply)
            near = self.short or room.free < 3 * supply.reserve
            await asyncio.sleep(_CLOSE_LOOK if near else _LOOK)

    def _tell_room(self, supply: Supply) -> None:
        """Whether another spare had better be adopted, if there is one on another machine."""
        tight = not supply.enough_for(self._need if self._bare else 0)
        if tight != self._tight:
            self._tight = tight
            self._tell({"kind": "room", "tight": tight})

    # -- giving up -----------------------------------------------------------------------------

    def _give_up(self, supply: Supply) -> None:
        now, spares = time.monotonic(), self._spares
        if not self.short:
            self.short = True
            self._patience.given_up(now)
            self._evaluate()
        for patience in (self._patience, self._spare_patience):
            patience.taken_back(False, now)
        turn = spares.index(self._fleet.rank) if self._fleet.rank in spares else len(spares)
        if not supply.last and self._ration.short_for < turn * _TURN:
            return
        if self._fleet.rank in spares:
            self._cool(supply, now)
        if supply.last or self._ration.short_for >= (len(spares) + 1) * _TURN:
            self._give_up_copies()

    def _cool(self, supply: Supply, now: float) -> None:
        if self._told is None and self._coolable:
            self._told = now
            self._spare_patience.given_up(now)
            self._held = self._now_held if self._bare is not None else 0
            self._tell({"kind": "warmth", "bare": True})
            return
        # It may be in the middle of its script, which goes on to where it can be left.
        if not supply.last:
            self._last_since = now
        since = max(self._last_since, self._told or 0.0)
        patient = now - since < _REACTION * (1 + self._spares.index(self._fleet.rank))
        if not patient and self._bare is not True and not self._mending:
            self._kill("given up, as memory was running out", time.time())

    @property
    def _mending(self) -> bool:
        """Whether a rank has died whose place a spare may be about to take."""
        return bool(self._fleet.known("dead") & self._crew.active)

    def _give_up_copies(self) -> None:
        if self._without_copies or not self._stores:
            return
        self._without_copies = True
        host = self._fleet.hosts[self._fleet.rank]
        self._courier.refused = f"memory is short on {host}"
        if self._fleet.rank != min(self._fleet.here()):
            return
        event = self._event("copies given up", {"host": host})
        text = f"memory is short on {host}: it gives up what it has of other nodes' checkpoints"

        def clear() -> None:
            cleared = [store.clear_others() for store in self._stores]
            if any(cleared):
                self._chronicle.note(event, text)

        # In a thread, for a store need not be in memory.
        Errand(clear)

    # -- taking back ---------------------------------------------------------------------------

    def _take_back(self, supply: Supply) -> None:
        now, spares = time.monotonic(), self._spares
        if self.short and self._patience.taken_back(supply.enough_for(0), now):
            self.short = self._without_copies = False
            self._courier.refused = ""
            self._evaluate()
        if self._fleet.rank not in spares or not self._bare or self._told is None:
            return
        turn = list(reversed(spares)).index(self._fleet.rank)
        if self._spare_patience.taken_back(supply.enough_for(self._need), now, turn):
            self._told = self._bare = None
            self._tell_all(True)
            self._tell({"kind": "warmth", "bare": False})

    # -- what the spare says -------------------------------------------------------------------

    def heard(self, bare: bool) -> None:
        """The spare has given up what it can, or has run its script."""
        if bare == self._bare:
            return
        former, self._bare = self._bare, bare
        self._tell_all(False)
        held = self._now_held
        self._held = max(self._held, held)
        if bare:
            self._need = self._held - held
        if self._room is None or (former is None and not bare and not self._need):
            # As it is from the beginning.
            return
        self._say(bare, held)

    def _say(self, bare: bool, held: int) -> None:
        assert self._room is not None
        world, room = self._fleet.rank, self._room
        host = self._fleet.hosts[world]
        detail: dict[str, object] = {"world": world, "host": host, "held": held}
        if bare:
            detail["given_back"] = self._need
            text = (
                f"memory is short on {host} ({_mib(room.free)} free of {_mib(room.limit)}, "
                f"{room.where}): spare {world} has given back {_mib(self._need)}, and has to run "
                "its script before it can train"
            )
        else:
            text = f"there is memory again on {host}: spare {world} is warm"
        event = self._event("spare cooled" if bare else "spare warmed", detail)
        self._chronicle.note(event, text)

    def _event(self, kind: str, detail: dict[str, object]) -> Event:
        room = self._room
        assert room is not None
        detail |= {"free": room.free, "limit": room.limit, "where": room.where}
        return Event(kind, self._step(), epoch=self._crew.epoch, detail=detail)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
