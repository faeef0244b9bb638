"""Has the faults of a schedule done to a run, each in its time, by hands on the hosts concerned."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hpcft.chaos import notes
from hpcft.chaos.faults import Task
from hpcft.chaos.schedule import OF_RANKS, Order
from hpcft.errors import UsageError
from hpcft.telemetry.events import Event
from hpcft.watch.runs import Jobs, Run

#: Seconds that a hand gets to start and to do a fault; srun may have to ask for it.
_START_TIME = 30.0
#: And to undo one.
_UNDO_TIME = 20.0
_LOOK = 0.1


@dataclass
class Deed:
    """An order, and what has become of it.

    who: has been hit, for people.
    host: where.
    worlds: world ranks of those hit.
    logical: the rank hit; None for a spare, or where it is not one process.
    step: steps completed when it was done, as far as was known.
    done, undone: when; seconds since 1970, None if not.
    refused: why it was not done; empty if it was.
    left: something has to be undone, and could not be.
    """

    order: Order
    who: str = ""
    host: str = ""
    worlds: tuple[int, ...] = ()
    logical: int | None = None
    step: int = 0
    done: float | None = None
    undone: float | None = None
    refused: str = ""
    left: bool = False


class Campaign:
    """Faults against one run.

    Parameters
    ----------
    checkpoints: the directory; empty if it is not known.
    yes, shared: as of :class:`hpcft.chaos.faults.Task`.
    seed: by which those are drawn whom the schedule does not name.
    tell: called with each line that is worth a look.
    """

    def __init__(
        self,
        run: Run,
        checkpoints: str,
        yes: bool,
        shared: bool,
        seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self._run = run
        self._rundir = run.rundir
        self._checkpoints = checkpoints
        self._yes = yes
        self._shared = shared
        self._chance = random.Random(seed)
        self._tell = tell
        self._hands: list[_Hand] = []
        self.deeds: list[Deed] = []

    def carry_out(self, orders: Sequence[Order]) -> None:
        """Do them all, in their time, and undo them; also when this is interrupted."""
        began = time.monotonic()
        try:
            for order in orders:
                deed = Deed(order)
                self.deeds.append(deed)
                while (left := began + order.at - time.monotonic()) > 0 and not self.over:
                    time.sleep(min(left, _LOOK))
                if self.over:
                    deed.refused = "the run had ended before"
                else:
                    self._do(deed)
            while any(not hand.ended for hand in self._hands) and not self.over:
                time.sleep(_LOOK)
        finally:
            for hand in self._hands:
                hand.close()
            for hand in self._hands:
                hand.wait()

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        if self._rundir.summary() is not None:
            return True
        return self._run.alive(Jobs([self._run])) is False

    @property
    def step(self) -> int:
        """Steps the run has completed, as far as is known."""
        status = self._rundir.status()
        return int(status["step"] or 0) if status else 0

    def _do(self, deed: Deed) -> None:
        order, entries = deed.order, self._rundir.ranks()
        chosen = self._choose(order, entries)
        if isinstance(chosen, str):
            deed.refused = chosen
            self._tell(f"{order.text}: not done: {chosen}")
            return
        host = str(chosen["host"])
        single = order.kind in OF_RANKS
        there = [entry for entry in entries if entry["host"] == host]
        deed.host, deed.step = host, self.step
        if single:
            deed.worlds, deed.logical = (chosen["world"],), chosen["logical"]
            deed.who = _name(chosen)
        elif order.kind in ("full", "corrupt"):
            deed.who = self._checkpoints
        else:
            deed.worlds = tuple(entry["world"] for entry in there)
            deed.who = f"host {host}"
        task = Task(
            order.kind,
            order.seconds,
            order.amount,
            order.newest,
            self._rundir.path,
            int(chosen["pid"]),
            tuple(int(entry["pid"]) for entry in there),
            tuple(self._peers(host)),
            self._checkpoints,
            self._yes,
            self._shared,
        )
        command = command_on(host, self._run)
        if command is None:
            deed.refused = f"there is no way to {host} from here but in a Slurm job"
        else:
            hand = _Hand(command, deed, self._note)
            self._hands.append(hand)
            hand.start({**asdict(task), "run_dir": str(task.run_dir)})
        if deed.refused:
            self._tell(f"{order.text}: not done: {deed.refused}")

    def _choose(self, order: Order, entries: list[dict[str, Any]]) -> dict[str, Any] | str:
        """Whom it hits; or why nobody."""
        if order.kind in ("full", "corrupt"):
            # Where the checkpoints can be seen from, at best from here.
            entries = [e for e in entries if is_here(str(e["host"]))] or entries
        role = "spare" if order.spare else "active"
        fits = [
            entry
            for entry in entries
            if (entry["role"] == role or order.kind not in OF_RANKS)
            and order.rank in (None, entry["logical"])
            and order.host in ("", entry["host"])
        ]
        if not fits:
            return "there is no such rank, spare or host in the run now"
        return self._chance.choice(fits)

    def _peers(self, host: str) -> Iterator[str]:
        """Addresses of the run's other hosts."""
        door = self._rundir.door()
        for peer in door["peers"] if door else ():
            if peer["host"] != host:
                yield str(peer["address"])

    def _note(self, deed: Deed) -> None:
        """Something has become of one; from the thread that hears of it."""
        order = deed.order
        over = deed.undone is not None
        detail: dict[str, Any] = {
            "fault": order.kind,
            "who": deed.who,
            "host": deed.host,
            "order": order.text,
        }
        if over and order.seconds:
            detail["over"] = True
        elif over or deed.done is None:
            return
        ranks = () if deed.logical is None else (deed.logical,)
        at = (deed.undone if over else deed.done) or time.time()
        step = self.step if over else deed.step
        said = "over" if over else "done"
        self._tell(f"{order.kind}, {deed.who}: {said} at step {step}")
        with contextlib.suppress(OSError):
            self._rundir.append([Event("chaos", step, ranks, self._epoch(), at, detail)])

    def _epoch(self) -> int:
        return max((event.epoch for event in self._rundir.launch_events()), default=0)


class _Hand:
    """A process that does one fault, here or on another host."""

    def __init__(self, command: list[str], deed: Deed, told: Callable[[Deed], None]) -> None:
        self._deed = deed
        self._told = told
        self._answered = threading.Event()
        # Ctrl-C is for this process alone: the hand is over when its input ends.
        self._process = subprocess.Popen(
            [*command, sys.executable, "-m", "hpcft.chaos.hand"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reading = threading.Thread(target=self._read, daemon=True)

    def start(self, task: dict[str, Any]) -> None:
        """Have it done, and wait for that."""
        assert self._process.stdin is not None
        self._reading.start()
        # Should it have ended already, the answer says so.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        if not self._answered.wait(_START_TIME):
            self._deed.refused = f"{self._deed.host} has not answered"
            self.close()

    @property
    def ended(self) -> bool:
        """Whether it has, and all is heard."""
        return not self._reading.is_alive()

    def close(self) -> None:
        """Have it undone now."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it is undone."""
        self._reading.join(_UNDO_TIME)
        deed = self._deed
        deed.left = deed.done is not None and deed.undone is None

    def _read(self) -> None:
        assert self._process.stdout is not None
        deed = self._deed
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, AttributeError):
                said = json.loads(line)
                deed.refused = str(said.get("refused", deed.refused))
                deed.done = said.get("done", deed.done)
                deed.undone = said.get("undone", deed.undone)
                if not deed.refused:
                    self._told(deed)
                self._answered.set()
        self._process.wait()
        if deed.done is None and not deed.refused:
            deed.refused = f"what should do it on {deed.host} ended with {self._process.returncode}"
        self._answered.set()


def undo(run: Run, tell: Callable[[str], None]) -> bool:
    """Undo what a campaign has left that was killed; whether nothing is left.

    Raises
    ------
    UsageError: something is on a host that cannot be come to from here.
    """
    hosts = {note.host for _, note in notes.left(run.rundir.path)}
    whole = True
    for host in sorted(hosts):
        command = command_on(host, run)
        if command is None:
            raise UsageError(
                f"something is to be undone on {host}", f"run `hpcft chaos --undo` on {host}"
            )
        done = subprocess.run(
            [*command, sys.executable, "-m", "hpcft.chaos.hand"],
            input=json.dumps({"undo": str(run.rundir.path)}) + "\n",
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        for line in done.stdout.splitlines():
            with contextlib.suppress(ValueError, LookupError):
                said = json.loads(line)
                kept = "kept" in said
                tell(f"{said['kept']}: {said['why']}" if kept else f"{said['cleared']}: undone")
        whole = whole and done.returncode == 0
    return whole


def command_on(host: str, run: Run) -> list[str] | None:
    """What comes before a command that is to run on a host; None if there is no way."""
    if is_here(host):
        return []
    job = run.entry.job if run.entry else ""
    if not job:
        return None
    return ["srun", "--overlap", f"--jobid={job}", "-N1", "-n1", "-w", host]


def is_here(host: str) -> bool:
    """Whether a run's host is this one."""
    own = socket.gethostname()
    return host in (own, own.partition(".")[0], os.environ.get("SLURMD_NODENAME"))


def _name(entry: dict[str, Any]) -> str:
    logical = entry["logical"]
    name = f"spare {entry['world']}" if logical is None else f"rank {logical}"
    return f"{name} on {entry['host']}"
