"""The shepherd: the small process that is the parent of one rank.

It starts the rank, relays its PMIx connection so that its death alarms nobody, learns why it ended,
tells all other shepherds and through them all other ranks, stops or kills it when it must not run,
and at the end leaves with the job's exit code. It knows neither torch nor MPI.

Life of a shepherd::

    STARTING   the rank starts MPI; the shepherds' addresses are exchanged over it.
               Any failure now ends the launch: there is no world yet that could heal.
    WATCHING   deaths are announced, silence is judged, the rank is held, killed, looked after.
    OVER       every rank is dead or done, or somebody asked for the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NoReturn

from hpcft.launch.cause import Ending
from hpcft.launch.channel import Message
from hpcft.launch.child import Child, adopt_orphans, die_with_parent
from hpcft.launch.fleet import Death, Fleet, Listener, Peer
from hpcft.launch.options import RunOptions
from hpcft.launch.place import Place
from hpcft.launch.relay import Relay
from hpcft.launch.siblings import Siblings
from hpcft.launch.watchdog import JamWatch, Watchdog
from hpcft.telemetry.events import Event, Times
from hpcft.telemetry.events import failure as failure_event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.world.link import LINK_FD, PROGRESS_FD, STACKS_SIGNAL
from hpcft.world.progress import Progress

#: Seconds a fenced shepherd waits to hear from the others.
_FENCED_TIME = 60.0
#: Seconds after which a recovery that all are in counts as jammed.
_JAM_TIME = 10.0
#: Seconds a killed process may take to end.
_REAP_TIME = 2.0
#: Seconds rank 0 waits before it speaks of a failed start; the others wait twice as long.
_SPEAK_FIRST = 1.0
#: Seconds in which all ranks must have started MPI.
_START_TIME = 300.0


class Shepherd:
    """One rank's shepherd; :meth:`run` is its life.

    Parameters
    ----------
    settings: environment variables for the rank.
    active: how many ranks train.
    ranks_here: how many ranks this node has.
    end_all: has the launcher end all its tasks.
    """

    def __init__(
        self,
        options: RunOptions,
        place: Place,
        settings: dict[str, str],
        active: int,
        ranks_here: int,
        end_all: Callable[[], None],
    ) -> None:
        self._options = options
        self._place = place
        self._settings = settings
        self._active = set(range(active))
        self._siblings = Siblings(ranks_here, time.monotonic())
        self._end_all = end_all
        self._rundir = RunDirectory(options.run_dir)
        self._over = asyncio.Event()
        self._asked = asyncio.Event()
        self._reaped = False
        self._fenced = False
        self._agreed = False
        #: rank -> how it ended, of those that ended as agreed
        self._endings: dict[int, Ending] = {}
        #: rank -> its death, and when it became known here
        self._deaths: dict[int, tuple[Death, float]] = {}
        self._reason = ""
        self._code: int | None = None
        self._stop_timer: asyncio.TimerHandle | None = None
        self._fleet: Fleet | None = None
        self._dying = ""

    async def run(self) -> int:
        """Look after the rank until the run is over.

        Returns
        -------
        The exit code to leave with.
        """
        loop = asyncio.get_running_loop()
        die_with_parent(signal.SIGTERM)
        adopt_orphans()
        self._listener = Listener(self._place.address)
        relay = await Relay.start(os.environ)
        self._progress = Progress.create()
        self._watchdog = Watchdog(self._progress, self._options.timeout_progress)
        self._jams = JamWatch(self._progress, _JAM_TIME)
        await self._start_child(relay.environ)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end, number)
        start_timer = loop.call_later(_START_TIME, self._start_failed, "ranks did not start MPI")
        self._start_timer = start_timer
        watching = asyncio.ensure_future(self._watch())
        await self._over.wait()
        start_timer.cancel()
        watching.cancel()
        self._child.kill()
        self._child.flush()
        if self._fleet is None:
            await self._leave_early()
        await self._await_reaping()
        await self._fleet.leave()
        code = self._exit_code()
        if code and self._place.rank == min(self._fleet.standing()):
            self._tell_of_failure()
        await relay.close()
        return code

    async def _await_reaping(self) -> None:
        """Wait a moment for the child's end: the others want to know its cause."""
        deadline = time.monotonic() + _REAP_TIME
        while not self._reaped and time.monotonic() < deadline:
            await asyncio.sleep(0.002)

    async def _start_child(self, environ: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        options = self._options
        environ = {
            **environ,
            **self._settings,
            LINK_FD: str(theirs.fileno()),
            PROGRESS_FD: str(self._progress.fd),
            "HPCFT_RUN": json.dumps(
                {
                    "run_dir": str(options.run_dir),
                    "spares": options.spares,
                    "min_ranks": options.min_ranks,
                    "on_failure": options.on_failure,
                    "verbose": options.verbose,
                    "warm": options.warm,
                    "digest": options.digest,
                    "checkpoints": options.checkpoints and asdict(options.checkpoints),
                    "terminal": sys.stderr.isatty() or bool(os.environ.get("HPCFT_TERMINAL")),
                }
            ),
        }
        how = ["-m"] if options.module else []
        command = [sys.executable, "-m", "hpcft.world.rank", *how, *options.target]
        self._child = Child(
            command,
            environ,
            (theirs.fileno(), self._progress.fd),
            self._rundir.log_file(self._place.rank),
        )
        theirs.close()
        self._echo(0 if self._place.rank == 0 else None)
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 24)
        self._reading = asyncio.ensure_future(self._read_link(reader))

    def _echo(self, logical: int | None) -> None:
        everything = self._options.verbose >= 3
        self._child.echo = logical == 0 or everything
        self._child.prefix = b"" if logical == 0 else f"[{self._place.rank}] ".encode()

    # -- the rank speaks -----------------------------------------------------------------------

    async def _read_link(self, reader: asyncio.StreamReader) -> None:
        # A rank that is killed can leave a broken pipe behind; that it ended is learnt elsewhere.
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                message = json.loads(line)
                await getattr(self, f"_rank_{message['kind']}")(message)

    def _tell(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def _rank_hello(self, message: Message) -> None:
        place = self._place
        if message["rank"] != place.rank or message["size"] != place.size:
            self._start_failed(
                f"the rank is {message['rank']} of {message['size']} in MPI, and not "
                f"{place.rank} of {place.size}: mpi4py uses another MPI than the one that starts it"
            )
            return
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._await_end, args=(loop,), daemon=True).start()
        peer = self._listener.peer(place.rank, place.node, place.host)
        self._tell({"kind": "peer", "peer": vars(peer)})

    async def _rank_table(self, message: Message) -> None:
        peers = [Peer(**peer) for peer in message["peers"]]
        fleet = Fleet(
            self._place.rank,
            peers,
            self._options.timeout_detect,
            self._learned,
            self._hold,
            self._fence,
        )
        await fleet.join(self._listener, bytes.fromhex(message["secret"]))
        self._fleet = fleet
        self._start_timer.cancel()
        self._tell({"kind": "ready"})

    async def _rank_role(self, message: Message) -> None:
        """The membership has changed: who is active, and what our rank is."""
        self._active = set(message["active"])
        self._echo(message["logical"])

    async def _rank_said(self, message: Message) -> None:
        """The rank is about to end, and says why."""
        self._child.said = message["text"]
        self._child.said_so = True

    async def _rank_agreed(self, message: Message) -> None:
        """All ranks have agreed that training is over: from now on ranks may leave."""
        self._agreed = True

    async def _rank_abort(self, message: Message) -> None:
        """The rank has found out that the run cannot go on."""
        self._end(message["code"], message["reason"])

    # -- the rank ends or stops ----------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid != self._child.pid:
                continue
            if os.WIFSTOPPED(status):
                self._stopped(time.time())
            elif os.WIFCONTINUED(status):
                self._continued()
            else:
                self._ended(self._child.end(status))

    def _stopped(self, at: float) -> None:
        if self._child.stopped_by_us or self._stop_timer or self._fleet is None:
            return
        loop = asyncio.get_running_loop()
        self._stop_timer = loop.call_later(
            self._options.timeout_detect * 0.75, self._kill_hung, "stopped (SIGSTOP)", at
        )

    def _continued(self) -> None:
        if self._stop_timer:
            self._stop_timer.cancel()
            self._stop_timer = None

    def _kill_hung(self, cause: str, at: float) -> None:
        # Killed first and announced when it is reaped: nobody goes on while it could still speak.
        self._dying = cause
        self._died_at = at
        self._child.kill()

    def _ended(self, ending: Ending) -> None:
        rank = self._place.rank
        self._reaped = True
        self._child.kill()
        if self._over.is_set() and rank not in self._deaths:
            return
        if self._fleet is None:
            self._start_failed(f"rank {rank} ended while starting: {ending.cause}", ending.code)
            return
        if rank in self._fleet.known("cause"):
            return
        # A script may do without job.run, or end before it: that is no failure if it says so by
        # its exit code.
        left = ending.code == 0 and not self._progress.read().running
        if self._agreed or (left and not self._dying):
            self._fleet.announce("done", rank, **asdict(ending))
            return
        cause = self._dying or ending.cause
        at = self._died_at if self._dying else time.time()
        self._fleet.announce_death(Death(rank, cause, at, ending.code))

    def _await_end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._progress.wait_for_end()
        at = time.time()
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is over
            loop.call_soon_threadsafe(self._vanished, at)

    def _vanished(self, at: float) -> None:
        """The rank's main thread is gone, which the kernel will tell of by and by."""
        if self._fleet is None or self._agreed or self._over.is_set():
            return
        if self._dying:
            self._fleet.announce_death(Death(self._place.rank, self._dying, self._died_at))
        elif self._progress.read().running and not self._child.said_so:
            self._fleet.announce_end(self._place.rank, at)

    def _asked_to_end(self, number: int) -> None:
        self._asked.set()
        if self._code is None:
            self._code = 128 + number
        self._child.send(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        reason = f"ended by {signal.Signals(number).name}"
        loop.call_later(0.05, self._end, 128 + number, reason)

    def _start_failed(self, reason: str, code: int = 1) -> None:
        if not self._over.is_set():
            self._code = code or 1
            self._reason = reason
            self._over.set()

    async def _leave_early(self) -> NoReturn:
        """Leave before the ranks have met, and have all the others leave.

        What fails here often fails everywhere; rank 0 comes first, so that one speaks for all.
        """
        try:
            await asyncio.wait_for(self._asked.wait(), _SPEAK_FIRST * (1 + (self._place.rank > 0)))
        except asyncio.TimeoutError:
            print(f"hpcft: {self._reason}", file=sys.stderr, flush=True)
            self._end_all()
        os._exit(self._code or 1)

    # -- the others speak ----------------------------------------------------------------------

    def _learned(self, fact: Message) -> None:
        kind, rank = fact["fact"], fact["rank"]
        if self._over.is_set() and (kind != "cause" or rank not in self._deaths):
            # Deaths from now on are the end's work, and not its cause.
            return
        if kind == "dead":
            if rank == self._place.rank:
                self._child.kill()
            else:
                self._tell(
                    {"kind": "failed", "rank": rank, "cause": fact["cause"], "at": fact["at"]}
                )
            death = Death(rank, fact["cause"], fact["at"], fact["code"])
            self._deaths[rank] = death, time.time()
        elif kind == "cause":
            death, known = self._deaths[rank]
            self._deaths[rank] = (
                replace(death, cause=fact["cause"], code=fact["code"]),
                known,
            )
            if rank != self._place.rank:
                self._tell({"kind": "cause", "rank": rank, "cause": fact["cause"]})
        elif kind == "done":
            self._endings[rank] = Ending(fact["code"], fact["cause"])
        elif kind == "end":
            if self._code is None:
                self._code = fact["code"]
            self._reason = fact["reason"]
            self._over.set()
        elif kind.startswith("stuck"):
            self._watchdog.complaints.heard(rank, time.monotonic())
        elif kind.startswith("jam"):
            self._jams.complaints.heard(rank, time.monotonic())
        self._check_over()

    def _check_over(self) -> None:
        if self._fleet is None:
            return
        dead, done = self._fleet.known("cause"), self._fleet.known("done")
        if len(dead | done) == self._place.size:
            self._over.set()

    def _hold(self, hold: bool) -> None:
        self._child.hold(hold)

    def _fence(self, reason: str) -> None:
        self._child.kill()
        if self._fenced or self._over.is_set():
            return
        self._fenced = True
        if self._options.verbose >= 2:
            print(f"hpcft: rank {self._place.rank}: {reason}", file=sys.stderr, flush=True)
        # The others decide how the run ends. Should the link heal, we learn of it in time to leave
        # with their exit code.
        asyncio.get_running_loop().call_later(_FENCED_TIME, self._give_up)

    def _give_up(self) -> None:
        self._code = 4
        self._over.set()

    def _end(self, code: int, reason: str) -> None:
        if self._fleet is None:
            self._start_failed(reason, code)
        else:
            self._fleet.announce("end", self._place.rank, code=code, reason=reason)

    def _exit_code(self) -> int:
        if self._code is not None:
            return self._code
        if not self._endings:
            # Nobody came to an agreed end: the first to fail speaks for all.
            return min((death for death, _ in self._deaths.values()), key=lambda d: d.at).code or 3
        ill = self._ended_ill()
        return self._endings[ill].code if ill is not None else 0

    def _ended_ill(self) -> int | None:
        """The first rank that failed when training was over, if one did."""
        return next((rank for rank in sorted(self._endings) if self._endings[rank].code), None)

    def _tell_of_failure(self) -> None:
        """The lowest shepherd left says why the run failed, and sums up if the run could not."""
        deaths = sorted(self._deaths.values(), key=lambda known: known[0].at)
        reason = self._reason
        ill = self._ended_ill()
        if not reason and ill is not None:
            reason = f"rank {ill} failed after the training was over: {self._endings[ill].cause}"
        if not reason and deaths:
            reason = f"all ranks failed, the last: {deaths[-1][0].cause}"
        if self._options.verbose:
            print(f"hpcft: the run has failed: {reason}", file=sys.stderr, flush=True)
        if self._rundir.summary_file.exists():
            return
        events = self._rundir.events()
        step = max((event.step for event in events), default=0)
        told = {event.detail["world"] for event in events if event.kind == "failure"}
        entries = {entry["world"]: entry for entry in self._rundir.ranks()} or self._as_launched()
        epoch = max((event.epoch for event in events), default=0) + 1
        # Those nobody has recovered from.
        failures = [
            failure_event(
                step,
                epoch,
                entries[death.rank]["logical"],
                death.rank,
                entries[death.rank]["host"],
                death.cause,
                Times(death.at, known),
            )
            for death, known in deaths
            if death.rank in entries.keys() - told
        ]
        self._rundir.append([*failures, Event("failed", step, detail={"reason": reason})])
        self._rundir.write_summary(summarise(self._rundir.events()))

    def _as_launched(self) -> dict[int, dict[str, Any]]:
        """What would be in ranks.json, had training begun."""
        assert self._fleet is not None
        return {
            rank: {"logical": rank if rank in self._active else None, "host": host}
            for rank, host in self._fleet.hosts.items()
        }

    # -- looking after the rank ----------------------------------------------------------------

    async def _watch(self) -> None:
        timeout = self._options.timeout_progress
        while True:
            await asyncio.sleep(min(0.5, timeout / 8) if timeout else 0.5)
            now = time.monotonic()
            if self._fleet is None:
                if self._siblings.missing(now):
                    self._start_failed("a rank's shepherd ended while the ranks were starting")
                continue
            if self._child.stopped_by_us:
                continue
            if self._jams.look(now):
                self._fleet.announce(f"jam {self._jams.times}", self._place.rank)
                if self._has_to_go(now):
                    seconds = _JAM_TIME
                    await self._kill_stuck(f"stuck in a recovery for {seconds:g} s", seconds)
                    return
            finding = self._watchdog.look(now, self._child.cpu_seconds)
            if finding == "stuck":
                await self._kill_stuck(f"stuck: no step for {timeout:g} s", timeout)
                return
            if finding == "waiting":
                self._fleet.announce(f"stuck {self._watchdog.times}", self._place.rank)
                alive = self._active - self._fleet.known("dead")
                if self._watchdog.complaints.from_all(alive, now):
                    self._child.send(STACKS_SIGNAL)
                    await asyncio.sleep(0.2)
                    self._end(
                        3,
                        "all ranks wait for each other and no step advances; their stacks are "
                        "in the logs",
                    )

    def _has_to_go(self, now: float) -> bool:
        """Whether all are in a recovery that is jammed, and this rank is the one that gives way.

        A spare is missed less than a rank with the state; beyond that, who coordinates MPI's
        agreement, which is the lowest, is the likeliest to bring it to its end by going.
        """
        assert self._fleet is not None
        alive = set(range(self._place.size)) - self._fleet.known("dead")
        first = min(alive, key=lambda rank: (rank in self._active, rank))
        return first == self._place.rank and self._jams.complaints.from_all(alive, now)

    async def _kill_stuck(self, cause: str, seconds: float) -> None:
        self._child.send(STACKS_SIGNAL)
        await asyncio.sleep(0.2)
        self._kill_hung(cause, time.time() - seconds)
