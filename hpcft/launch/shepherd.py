"""The shepherd: looks after one rank, through one launch of all ranks.

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
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Mapping
from dataclasses import asdict, astuple, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore, step_of
from hpcft.ckpt.store import STATE
from hpcft.errors import INTERRUPTED, TooFewRanks
from hpcft.launch.cause import Ending
from hpcft.launch.channel import Message
from hpcft.launch.child import Child
from hpcft.launch.company import Company, Peer
from hpcft.launch.courier import Address, Courier
from hpcft.launch.departure import Departure
from hpcft.launch.fleet import Death, Fleet, Listener
from hpcft.launch.guest import Door
from hpcft.launch.options import RunOptions, Sizes
from hpcft.launch.place import Place, Task
from hpcft.launch.relay import Relay
from hpcft.launch.siblings import Siblings
from hpcft.launch.warm import Warm
from hpcft.launch.watchdog import JamWatch, Watchdog
from hpcft.slurm import nodes
from hpcft.slurm.job import find as find_job
from hpcft.slurm.job import graces
from hpcft.slurm.requeue import Budget, conclude, requeue
from hpcft.slurm.step import Step
from hpcft.telemetry.events import Event, Times
from hpcft.telemetry.events import failure as failure_event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.world.link import STACKS_SIGNAL
from hpcft.world.progress import Progress

#: Seconds a fenced shepherd waits to hear from the others.
_FENCED_TIME = 60.0
#: Seconds after which a recovery that all are in counts as jammed.
_JAM_TIME = 10.0
#: Seconds a killed process may take to end.
_REAP_TIME = 2.0
#: Seconds a process may take to end after its main thread.
_LINGER_TIME = 10.0
#: Seconds in which the others notice that the launch was called off; who does not is signalled.
_NOTICE_TIME = 1.0
#: Seconds between two looks at whether the node that is sent copies is still there.
_COPY_LOOK = 0.5
#: Exit code of a run that cannot go on in place.
_TOO_MUCH = TooFewRanks.exit_code
#: Seconds after which it is said that a run that was asked to end is still in a step.
_STEP_TIME = 10.0
#: By so much a save may be slower than the one before.
_SAFETY = 1.5
#: Seconds within which a second SIGTERM is the first once more: Slurm sends it to all processes of
#: a job, and srun, if it is among them, passes it on.
_ECHO_TIME = 3.0
#: Signals that end a run, and those that only warn of its end.
_ENDS = (signal.SIGTERM, signal.SIGINT)
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
#: Seconds in which all ranks must have started MPI, and those that go by before the last of them
#: has imported what is preloaded.
_START_TIME, _PRELOAD_TIME = 300.0, 3600.0


#: The facts that all ranks are to leave in order: for the run to end, or to be resized.
_LEAVE, _RESIZE = "leave", "resize"
#: Seconds between a guest and the resize, for others that come with it.
_GATHER_TIME = 0.3
#: Seconds between two looks at whether Slurm wants nodes back.
_DRAIN_LOOK = 30.0


class Shepherd:
    """One rank's shepherd; :meth:`run` is the rank's life.

    Parameters
    ----------
    task: this process.
    place: of the rank; in a relaunch it may be another than the task's.
    environ: the environment of the rank, with its place in MPI.
    active: how many ranks train.
    sizes: how many do in other launches.
    warm: what the rank is forked from.
    number: which launch of the run it is, from 1.
    former: the shepherds of the launch before this, or who this task was a guest of.
    ticket: connection to what lends the rank its place in MPI.
    lost: names of the nodes that the run has lost before.

    Attributes
    ----------
    again: after :meth:`run`: the ranks could not go on, and another launch might.
    fleet: the shepherds of this launch; None if the ranks have not met.
    step: the last that the rank had completed.
    """

    def __init__(
        self,
        options: RunOptions,
        task: Task,
        place: Place,
        environ: Mapping[str, str],
        active: int,
        sizes: Sizes,
        warm: Warm,
        number: int = 1,
        former: Company | None = None,
        ticket: socket.socket | None = None,
        lost: frozenset[str] = frozenset(),
    ) -> None:
        self._options = options
        self._task = task
        self._place = place
        self._environ = environ
        self._sizes = sizes
        self._warm = warm
        self._number = number
        self._former = former
        self._ticket = ticket
        self._lost = lost
        self.again = False
        self._active = set(range(active))
        self._siblings = Siblings(task.ranks_here, time.monotonic())
        self._rundir = RunDirectory(options.run_dir)
        self._over = asyncio.Event()
        self._asked = asyncio.Event()
        self._reaped = False
        #: Statuses of processes that have ended: the rank may be one before its number is known.
        self._reaped_strangers: dict[int, int] = {}
        #: Whether somebody wants no other launch.
        self._final = False
        #: Whether the launch has ended for something another launch might not meet.
        self._again = False
        self._fenced = False
        self._agreed = False
        #: rank -> how it ended, of those that ended as agreed
        self._endings: dict[int, Ending] = {}
        #: rank -> its death, and when it became known here
        self._deaths: dict[int, tuple[Death, float]] = {}
        self._reason = ""
        self._code: int | None = None
        self._stop_timer: asyncio.TimerHandle | None = None
        self.fleet: Fleet | None = None
        self._dying = ""
        tiers = options.checkpoints.near if options.checkpoints else ()
        self._near = [NearStore(Path(tier.path)) for tier in tiers]
        self._courier = Courier(self._place.rank, self._near)
        self._copying: set[asyncio.Task[None]] = set()
        self._unsaved = False
        #: Whether the ranks have left what the next launch is to go on from.
        self._handed_over = False
        self._saved = False
        self._door_lock = threading.Lock()
        self._resizing = False
        self._draining: asyncio.Future[None] | None = None
        self._leave_reason, self._leave_code = "", 0
        self._departures = {purpose: Departure() for purpose in (_LEAVE, _RESIZE)}
        #: When the first signal that ends has come.
        self._ending = math.inf

    @property
    def code(self) -> int:
        """The exit code that this launch has come to."""
        return self._exit_code()

    @property
    def lost(self) -> frozenset[str]:
        """Names of the nodes that the run has lost so far."""
        assert self.fleet is not None
        return self._lost | {self.fleet.hosts[leader] for leader in self.fleet.known("lost")}

    @property
    def step(self) -> int:
        return self._progress.read().step

    @property
    def _speaks(self) -> bool:
        """Whether this shepherd does what one is to do for all."""
        assert self.fleet is not None
        staying = self.fleet.standing() - self.fleet.retiring()
        return self._place.rank == min(staying, default=-1)

    @property
    def resizes(self) -> bool:
        """Whether this launch has ended for nothing but to be followed by one of another size."""
        left = any(ending.code == INTERRUPTED for ending in self._endings.values())
        return left and not self._leave_reason and self._code is None

    async def run(self) -> int:
        """Look after the rank until the launch is over; :meth:`conclude` or a relaunch follows.

        Returns
        -------
        The exit code it comes to.
        """
        loop = asyncio.get_running_loop()
        self._parent = os.getppid()
        self._listener = Listener(self._place.address)
        self._relay = await Relay.start(self._environ)
        self._progress = Progress.create()
        self._watchdog = Watchdog(self._progress, self._options.timeout_progress)
        self._jams = JamWatch(self._progress, _JAM_TIME)
        self._child = Child(self._warm.pid)
        self._echo(0 if self._place.rank == 0 else None)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        # What has ended before this.
        self._reap()
        for number in _ENDS + _WARNINGS:
            loop.add_signal_handler(number, self._signalled, number)
        if self._former:
            self._former.on_fact = self._learned_formerly
        if self._ticket:
            loop.add_reader(self._ticket, self._place_lost)
        starting = asyncio.ensure_future(self._start_child())
        patience = _START_TIME + (_PRELOAD_TIME if self._options.preload else 0)
        start_timer = loop.call_later(patience, self._start_failed, "ranks did not start MPI")
        self._start_timer = start_timer
        watching = asyncio.ensure_future(self._watch())
        await self._over.wait()
        for task in (start_timer, watching, starting, self._draining):
            if task:
                task.cancel()
        if self._ticket:
            loop.remove_reader(self._ticket)
        self._child.kill()
        if self.fleet is None and self._former is None:
            await self._leave_early()
        await self._await_reaping()
        for copying in self._copying:
            copying.cancel()
        self._courier.close()
        # Nobody waits for it but who leaves.
        self._leaving = asyncio.ensure_future(self._relay.close())
        if self.fleet is None:
            assert self._former is not None
            self.again = not (self._final or self._asked.is_set())
            if self.again:
                self._former.announce(f"failed {self._number}", self._former.rank)
                if self._options.verbose >= 2:
                    rank = self._place.rank
                    print(f"hpcft: rank {rank}: {self._reason}", file=sys.stderr, flush=True)
            return self._code or 1
        self.again = self._another()
        return self._exit_code()

    def _another(self) -> bool:
        """Whether this launch, which is over, is to be followed by another."""
        unwanted = self._fenced or self._asked.is_set() or bool(self._leave_reason)
        if unwanted:
            return False
        lost = self._again or (self._code is None and not self._endings)
        return self.resizes or (self._options.max_relaunch > 0 and lost)

    async def conclude(self, given_up: tuple[int, str] | None = None) -> int:
        """The run is over.

        Parameters
        ----------
        given_up: the exit code and the reason, if another launch was thought of.

        Returns
        -------
        The exit code to leave with.
        """
        assert self.fleet is not None
        if given_up:
            self._code, self._reason = given_up
        await self.fleet.leave()
        await self._leaving
        code = self._exit_code()
        if code not in (0, INTERRUPTED) and self._speaks:
            self._tell_of_failure()
        if self._options.most_requeues is not None:
            self._tell_slurm(code, self._options.most_requeues)
        if code == INTERRUPTED and self._handed_over and self._speaks:
            self._tell_of_interruption()
        unwanted = self._asked.is_set() and os.getppid() == self._parent
        over = unwanted or (code in (0, INTERRUPTED) and not self._unsaved)
        # Others on this node may go on with what is there.
        retired = not self.fleet.here() - self.fleet.retiring()
        if retired or (over and not self._handed_over):
            # After a failure, as is the death of what has started this process, the next start may
            # want them.
            for store in self._near:
                store.clear_all()
        return code

    def _place_lost(self) -> None:
        """What lends places in MPI has ended: without it ranks cannot start.

        Those that have started train on and heal without it.
        """
        assert self._ticket is not None
        asyncio.get_running_loop().remove_reader(self._ticket)
        if self._former:
            self._end(_TOO_MUCH, "mpiexec or srun has ended while it relaunched", again=True)

    def _learned_formerly(self, fact: Message) -> None:
        """While this launch is starting, what the shepherds of the former one say."""
        if self.fleet:
            return
        if fact["fact"] == "end":
            self._final = True
            self._start_failed(fact["reason"], fact["code"])
        elif fact["fact"] in (f"failed {self._number}", "lost", "gone"):
            self._start_failed("another shepherd is lost, or its rank did not start")

    def _tell_slurm(self, code: int, most: int) -> None:
        """Have Slurm start the job again where that helps, if this shepherd is to see to it."""
        assert self.fleet is not None
        step = self._task.step
        if step is None or not self._speaks:
            return
        if code not in (INTERRUPTED, TooFewRanks.exit_code):
            how = f"failed with exit code {code}" if code else "finished"
            conclude(step.job, step.restarts, self._rundir.events(), how)
            return
        budget = Budget(step.restarts, most)
        event, said = requeue(step.job, budget, self._rundir.events(), self.lost)
        self._rundir.append([event])
        self._rundir.write_summary(summarise(self._rundir.events()))
        if self._options.verbose:
            print(said, file=sys.stderr, flush=True)

    async def _await_reaping(self) -> None:
        """Wait a moment for the child's end: the others want to know its cause."""
        deadline = time.monotonic() + _REAP_TIME
        while not self._reaped and time.monotonic() < deadline:
            await asyncio.sleep(0.002)

    async def _start_child(self) -> None:
        ours, theirs = socket.socketpair()
        options = self._options
        environ = {
            **self._relay.environ,
            "HPCFT_RUN": json.dumps(
                {
                    "run_dir": str(options.run_dir),
                    "spares": self._place.size - len(self._active),
                    "initial": self._sizes.initial,
                    "min_ranks": options.min_ranks,
                    "on_failure": options.on_failure,
                    "verbose": options.verbose,
                    "warm": options.warm,
                    "digest": options.digest,
                    "checkpoints": options.checkpoints and asdict(options.checkpoints),
                    "restarts": self._task.step.restarts if self._task.step else 0,
                    "terminal": sys.stderr.isatty() or bool(os.environ.get("HPCFT_TERMINAL")),
                }
            ),
        }
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 24)
        try:
            pid = await self._warm.fork(environ, (theirs.fileno(), self._progress.fd))
        except ProcessLookupError:
            # The kernel tells of its end, and why.
            return
        finally:
            theirs.close()
        self._child.pid = pid
        if pid in self._reaped_strangers:
            self._ended(self._child.end(self._reaped_strangers[pid]))
        await self._read_link(reader)

    def _echo(self, logical: int | None) -> None:
        everything = self._options.verbose >= 3
        self._warm.echo = logical == 0 or everything
        self._warm.prefix = b"" if logical == 0 else f"[{self._place.rank}] ".encode()

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
        secret, self._secret = bytes.fromhex(message["secret"]), message["secret"]
        self._peers = peers
        await self._courier.listen(self._listener.courier, secret)
        await fleet.join(self._listener, secret)
        self.fleet = fleet
        self._start_timer.cancel()
        self._tell({"kind": "ready"})

    async def _rank_met(self, message: Message) -> None:
        """All ranks have met, and all shepherds: those of the former launch can part."""
        assert self.fleet is not None
        if self._former:
            former, self._former = self._former, None
            self._parting = asyncio.ensure_future(former.leave())
        if self._place.rank == 0:
            # In a thread, for a file system that hangs must not keep the shepherd.
            Errand(self._open_door)
        if self._task.step and self._options.checkpoints:
            self._draining = asyncio.ensure_future(self._look_for_drains())

    async def _rank_role(self, message: Message) -> None:
        """The membership has changed: who is active, and what our rank is."""
        self._active = set(message["active"])
        for departure in self._departures.values():
            departure.epoch = message["epoch"]
        self._echo(message["logical"])
        for purpose in self._departures:
            if self.fleet and self.fleet.known(purpose):
                self._ask_to_leave(purpose)
                self._settle_departure(purpose)
        self._consider_resize()

    async def _rank_at(self, message: Message) -> None:
        """The rank was asked to leave, and says how far it is."""
        assert self.fleet is not None
        purpose, epoch, step = message["purpose"], message["epoch"], message["step"]
        if step >= 0:
            detail = {"purpose": purpose, "epoch": epoch, "step": step}
            self.fleet.announce(f"at {purpose} {epoch}", self._place.rank, **detail)
        elif purpose == _LEAVE:
            # There is nothing to save yet.
            self._end(self._leave_code, self._leave_reason)

    async def _rank_said(self, message: Message) -> None:
        """The rank is about to end, and says why."""
        self._child.said = message["text"]
        self._child.said_so = True

    async def _rank_imported(self, message: Message) -> None:
        """The script has set up what it trains, and has imported what it needs for that."""
        if not (self._options.max_relaunch or self._options.checkpoints):
            return
        self._warm.learn(message["modules"])
        if self._place.rank == 0:
            Errand(self._open_door)

    async def _rank_agreed(self, message: Message) -> None:
        """All ranks have agreed that training is over: from now on ranks may leave."""
        self._agreed = True
        self._handed_over = message["handed_over"]

    async def _rank_copy(self, message: Message) -> None:
        """The rank has written its part of a checkpoint near it; another node is to have it."""
        # The link must be heard meanwhile.
        task = asyncio.ensure_future(self._copy(message))
        self._copying.add(task)
        task.add_done_callback(self._copying.discard)

    async def _copy(self, message: Message) -> None:
        assert self.fleet is not None
        assert self._options.checkpoints is not None
        number, checkpoint, files = message["tier"], message["checkpoint"], message["files"]
        tier, why = self._options.checkpoints.near[number], ""
        partner = self.fleet.partner(self._active) if tier.copies != "none" else None
        xor = tier.copies == "xor"
        members = self.fleet.parity_set(self._active, tier.set_size) if xor else []
        try:
            if len(members) > 1:
                own = [name for name in files if name != STATE]
                addresses = [_address(member) for member in members]
                sending = self._courier.send_parity(
                    addresses, number, checkpoint, own[0] if own else ""
                )
                await self._unless_lost(sending, {member.rank for member in members})
                # What says where everything is is small, and everybody's.
                files = [name for name in files if name == STATE]
            if partner and files:
                sending = self._courier.send(_address(partner), number, checkpoint, files)
                await self._unless_lost(sending, {partner.rank})
        except Exception as error:
            # Whatever it is: the rank waits for the answer.
            why = f"no copies on other nodes: {error or type(error).__name__}"
        self._tell({"kind": "copied", "checkpoint": checkpoint, "why": why})

    async def _unless_lost(self, sending: Coroutine[Any, Any, None], to: set[int]) -> None:
        """Send, unless one of those it goes to is lost, which TCP would find out after minutes.

        Raises
        ------
        OSError: that could not be.
        """
        assert self.fleet is not None
        task = asyncio.ensure_future(sending)
        try:
            while not (await asyncio.wait({task}, timeout=_COPY_LOOK))[0]:
                if not to <= self.fleet.standing():
                    raise ConnectionError("one has failed meanwhile")
            task.result()
        finally:
            task.cancel()

    async def _rank_unsaved(self, message: Message) -> None:
        """Training is over, and the last checkpoint could not be saved but near the ranks."""
        self._unsaved = True

    async def _rank_saved(self, message: Message) -> None:
        """A checkpoint is committed; after the first, see whether it could be in the time left."""
        if self._task.step and not self._saved:
            self._saved = True
            # In a thread, for the controller may be slow.
            arguments = self._task.step, message["seconds"]
            threading.Thread(target=_warn_of_short_grace, args=arguments, daemon=True).start()

    async def _rank_abort(self, message: Message) -> None:
        """The rank has found out that the run cannot go on."""
        self._end(message["code"], message["reason"], again=message["code"] == _TOO_MUCH)

    # -- the rank ends or stops ----------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            over = not (os.WIFSTOPPED(status) or os.WIFCONTINUED(status))
            if over and pid == self._warm.pid:
                self._warm.ended = True
            if pid != self._child.pid:
                if over:
                    self._reaped_strangers[pid] = status
                continue
            if os.WIFSTOPPED(status):
                self._stopped(time.time())
            elif os.WIFCONTINUED(status):
                self._continued()
            else:
                self._ended(self._child.end(status))

    def _stopped(self, at: float) -> None:
        if self._child.stopped_by_us or self._stop_timer or self.fleet is None:
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
        if self.fleet is None:
            self._start_failed(f"rank {rank} ended while starting: {ending.cause}", ending.code)
            return
        if rank in self.fleet.known("cause"):
            return
        # A script may do without job.run, or end before it: that is no failure if it says so by
        # its exit code.
        left = ending.code == 0 and not self._progress.read().running
        if self._agreed or (left and not self._dying):
            self.fleet.announce("done", rank, **asdict(ending))
            return
        cause = self._dying or ending.cause
        at = self._died_at if self._dying else time.time()
        self.fleet.announce_death(Death(rank, cause, at, ending.code))

    def _await_end(self, loop: asyncio.AbstractEventLoop) -> None:
        self._progress.wait_for_end()
        at = time.time()
        with contextlib.suppress(RuntimeError):  # the loop is closed: all is over
            loop.call_soon_threadsafe(self._vanished, at)

    def _vanished(self, at: float) -> None:
        """The rank's main thread is gone, which the kernel will tell of by and by."""
        if self.fleet is None or self._over.is_set():
            return
        if self._agreed:
            loop = asyncio.get_running_loop()
            loop.call_later(_LINGER_TIME, self._lingers)
        elif self._dying:
            self.fleet.announce_death(Death(self._place.rank, self._dying, self._died_at))
        elif self._progress.read().running and not self._child.said_so:
            self.fleet.announce_end(self._place.rank, at)

    def _lingers(self) -> None:
        """All is over, but the kernel keeps the process: a file system does not answer a thread."""
        if self._reaped or self._over.is_set():
            return
        assert self.fleet is not None
        rank, pid = self._place.rank, self._child.pid
        if self._options.verbose:
            print(
                f"hpcft: rank {rank} does not end, for it waits for a file system that does not "
                f"answer; process {pid} is left behind",
                file=sys.stderr,
                flush=True,
            )
        ending = Ending(int(self._child.said_so), "left behind, waiting for a file system")
        self.fleet.announce("done", rank, **asdict(ending))

    def _signalled(self, number: int) -> None:
        """Somebody wants the run to end: by a warning, in order, or by a second signal at once."""
        if self._over.is_set():
            # Between two launches nobody is there who could leave in order.
            if self._another():
                self._asked_to_end(number)
            return
        if self._task.joined and self.fleet and number in _ENDS:
            self._retire(number)
            return
        now = time.monotonic()
        ends = number in _ENDS
        again = ends and now > self._ending + (_ECHO_TIME if number == signal.SIGTERM else 0)
        if ends:
            self._ending = min(self._ending, now)
        can_save = self._options.checkpoints is not None
        name = signal.Signals(number).name
        if not can_save and number in _WARNINGS:
            if self._place.rank == 0:
                print(
                    f"hpcft: {name}: there is nowhere to save to; start with --ckpt-dir DIR",
                    file=sys.stderr,
                    flush=True,
                )
            return
        orphaned = os.getppid() != self._parent
        begun = self.fleet is not None and not self._agreed
        if not (can_save and begun) or orphaned or again:
            self._asked_to_end(number)
            return
        assert self.fleet is not None
        if not self.fleet.known(_LEAVE):
            # Of no rank in particular, so that one of all that are signalled at once gets around.
            self.fleet.announce(_LEAVE, 0, reason=name, code=128 + number)

    def _ask_to_leave(self, purpose: str) -> None:
        """Have the rank say how far it is, if it trains."""
        assert self.fleet is not None
        if self._place.rank in self._active:
            fact = self.fleet.said(purpose)[0]
            durable = bool(fact.get("durable"))
            reason = fact["reason"]
            message = {"kind": "leave", "purpose": purpose, "reason": reason, "durable": durable}
            self._tell(message)

    def _settle_departure(self, purpose: str) -> None:
        departure = self._departures[purpose]
        step = departure.until(self._active)
        if step is not None:
            epoch = departure.epoch
            self._tell({"kind": "until", "purpose": purpose, "epoch": epoch, "step": step})

    # -- others come and go --------------------------------------------------------------------

    def _open_door(self) -> None:
        """Let others know how to come to this launch; the run goes on without if that fails."""
        closed = "" if self._options.checkpoints else "start it with --ckpt-dir DIR"
        door = Door(
            self._number,
            self._secret,
            tuple(self._peers),
            self._options.argv,
            os.getcwd(),
            tuple(self._warm.learnt),
            astuple(self._sizes),
            self._options.min_ranks,
            closed,
        )
        with self._door_lock, contextlib.suppress(OSError):
            self._rundir.write_door(door.to_json())

    def _consider_resize(self) -> None:
        """Somebody has come, or is to go, or the ranks are others."""
        if self._wants_resize() and not self._resizing:
            self._resizing = True
            asyncio.get_running_loop().call_later(_GATHER_TIME, self._resize)

    def _wants_resize(self) -> bool:
        """Whether there is to be one, and this shepherd is to say so."""
        if self.fleet is None or self._over.is_set() or self.fleet.known(_RESIZE):
            return False
        training = self.fleet.standing() & self._active
        wished = bool(self.fleet.guests() or self.fleet.retiring())
        return wished and self._place.rank == min(training, default=-1)

    def _resize(self) -> None:
        self._resizing = False
        if not self._wants_resize():
            return
        assert self.fleet is not None
        if not self._progress.read().running:
            self._consider_resize()
            return
        coming, going = self.fleet.guests(), self.fleet.retiring()
        hosts = self.fleet.hosts
        words = [_named("joins", "join", list(coming.values()))] if coming else []
        words += [_named("leaves", "leave", [hosts[rank] for rank in going])] if going else []
        # What is near the ranks goes with those who leave.
        self.fleet.announce(_RESIZE, 0, reason=", ".join(words), durable=bool(going))

    def _retire(self, number: int) -> None:
        """Who has joined leaves again, at a step's end; asked twice, at once."""
        assert self.fleet is not None
        if self._place.rank in self.fleet.retiring():
            # Which is a failure to the others.
            self._child.kill()
            self._warm.kill()
            os._exit(128 + number)
        self.fleet.announce("retire", self._place.rank, reason=signal.Signals(number).name)

    async def _look_for_drains(self) -> None:
        """Have the ranks leave nodes that Slurm is to have back when their jobs have ended."""
        assert self.fleet is not None
        while True:
            await asyncio.sleep(_DRAIN_LOOK)
            if not self._speaks:
                continue
            standing = self.fleet.standing()
            hosts = {rank: host for rank, host in self.fleet.hosts.items() if rank in standing}
            names = set(hosts.values())
            # A controller that does not answer must not keep the shepherd either.
            asking = Errand(partial(nodes.draining, names))
            while not asking.done:
                await asyncio.sleep(0.1)
            going = {rank for rank, host in hosts.items() if host in asking.result()}
            if len(standing - going) >= self._options.min_ranks:
                for rank in going - self.fleet.known("retire"):
                    self.fleet.announce("retire", rank, reason=f"{hosts[rank]} is drained")

    def _still_in_a_step(self) -> None:
        assert self.fleet is not None
        first = min(self.fleet.standing()) == self._place.rank
        if first and not self._agreed and self._options.verbose:
            step = self._progress.read().step
            print(
                f"hpcft: asked to end {_STEP_TIME:g} s ago; rank {self._place.rank} has completed "
                f"step {step}, and leaves when the next is done and saved; a second SIGTERM or "
                "Ctrl-C ends it at once",
                file=sys.stderr,
                flush=True,
            )

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

        What fails here often fails everywhere; the first to call the launch off speaks for all.
        """
        self._warm.kill()
        self._warm.flush()
        if not self._asked.is_set() and self._rundir.call_off(self._task.launch):
            print(f"hpcft: {self._reason}", file=sys.stderr, flush=True)
            # A signal could come before who is still starting can take it for what it is.
            await asyncio.sleep(_NOTICE_TIME)
            self._task.end_all()
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
        elif kind == _LEAVE:
            self._leave_reason, self._leave_code = fact["reason"], fact["code"]
            asyncio.get_running_loop().call_later(_STEP_TIME, self._still_in_a_step)
            self._ask_to_leave(_LEAVE)
        elif kind == _RESIZE:
            self._ask_to_leave(_RESIZE)
        elif kind in ("guest", "retire"):
            self._consider_resize()
        elif kind.startswith("at "):
            self._departures[fact["purpose"]].at(fact["epoch"], rank, fact["step"])
            self._settle_departure(fact["purpose"])
        elif kind == "done":
            self._endings[rank] = Ending(fact["code"], fact["cause"])
        elif kind in ("end", "over"):
            if self._code is None:
                self._code = fact["code"]
            self._reason = fact["reason"]
            self._again = kind == "over"
            self._over.set()
        elif kind.startswith("stuck"):
            self._watchdog.complaints.heard(rank, time.monotonic())
        elif kind.startswith("jam"):
            self._jams.complaints.heard(rank, time.monotonic())
        self._check_over()

    def _check_over(self) -> None:
        if self.fleet is None:
            return
        dead, done = self.fleet.known("cause"), self.fleet.known("done")
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

    def _end(self, code: int, reason: str, again: bool = False) -> None:
        fact = "over" if again and self._options.max_relaunch else "end"
        if self._former:
            self._former.announce(fact, self._former.rank, code=code, reason=reason)
        if self.fleet is None:
            self._start_failed(reason, code)
        else:
            self.fleet.announce(fact, self._place.rank, code=code, reason=reason)

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

    def why(self) -> str:
        """Why the run, or this launch, has failed."""
        deaths = sorted(self._deaths.values(), key=lambda known: known[0].at)
        ill = self._ended_ill()
        if not self._reason and ill is not None:
            return f"rank {ill} failed after the training was over: {self._endings[ill].cause}"
        if not self._reason and deaths:
            return f"all ranks failed, the last: {deaths[-1][0].cause}"
        if not self._reason and self.resizes:
            return "the ranks, which had left to be launched with others, did not start again"
        return self._reason

    def raised(self) -> int | None:
        """The first rank that failed, if all failures are by an exception or an exit code."""
        deaths = sorted((death for death, _ in self._deaths.values()), key=lambda d: d.at)
        return deaths[0].rank if deaths and all(d.code < 128 for d in deaths) else None

    def note_relaunch(self, step: int, hosts: dict[int, str]) -> None:
        """Write down that this launch has failed, and another is to come.

        Parameters
        ----------
        hosts: where the shepherds are that are left.
        """
        detail = {"reason": self.why(), "number": self._number, "hosts": sorted({*hosts.values()})}
        again = Event("relaunch", step, tuple(range(len(hosts))), detail=detail)
        self._rundir.append([*self._untold_failures(), again])

    def note_resize(self, step: int, hosts: dict[int, str]) -> None:
        """Write down that the ranks have left to be as many as there are ``hosts``, and say so."""
        assert self.fleet is not None
        reason = self.fleet.said(_RESIZE)[0]["reason"]
        detail = {"reason": reason, "number": self._number, "hosts": sorted({*hosts.values()})}
        self._rundir.append([Event("resize", step, tuple(range(len(hosts))), detail=detail)])
        if self._options.verbose:
            text = f"hpcft: step {step}: {reason}; going on with {len(hosts)} processes"
            print(text, file=sys.stderr, flush=True)

    def _tell_of_failure(self) -> None:
        """The lowest shepherd left says why the run failed, and sums up if the run could not."""
        reason = self.why()
        if self._options.verbose:
            print(f"hpcft: the run has failed: {reason}", file=sys.stderr, flush=True)
            for store in self._near:
                if left := sorted(store.files()):
                    print(
                        f"hpcft: checkpoints up to step {step_of(left[-1])} are kept for the next "
                        f"start, on the nodes in {store.path}",
                        file=sys.stderr,
                        flush=True,
                    )
        if self._rundir.summary_file.exists():
            return
        failures = self._untold_failures()
        step = max((event.step for event in self._rundir.events()), default=0)
        self._rundir.append([*failures, Event("failed", step, detail={"reason": reason})])
        self._rundir.write_summary(summarise(self._rundir.events()))

    def _tell_of_interruption(self) -> None:
        """The ranks have left to be launched again, and then the run was asked to end."""
        step = max((event.step for event in self._rundir.events()), default=0)
        detail = {"reason": self._leave_reason, "newest": self.step}
        self._rundir.append([Event("interrupted", max(step, self.step), detail=detail)])
        self._rundir.write_summary(summarise(self._rundir.events()))

    def _untold_failures(self) -> list[Event]:
        """The failures of this launch that nobody has recovered from."""
        events = self._rundir.launch_events()
        step = max((event.step for event in self._rundir.events()), default=0)
        told = {event.detail["world"] for event in events if event.kind == "failure"}
        entries = {entry["world"]: entry for entry in self._rundir.ranks()} or self._as_launched()
        epoch = max((event.epoch for event in events), default=0) + 1
        return [
            failure_event(
                step,
                epoch,
                entries[death.rank]["logical"],
                death.rank,
                entries[death.rank]["host"],
                death.cause,
                Times(death.at, known),
            )
            for death, known in sorted(self._deaths.values(), key=lambda known: known[0].at)
            if death.rank in entries.keys() - told
        ]

    def _as_launched(self) -> dict[int, dict[str, Any]]:
        """What would be in ranks.json, had training begun."""
        assert self.fleet is not None
        return {
            rank: {"logical": rank if rank in self._active else None, "host": host}
            for rank, host in self.fleet.hosts.items()
        }

    # -- looking after the rank ----------------------------------------------------------------

    async def _watch(self) -> None:
        timeout = self._options.timeout_progress
        while True:
            await asyncio.sleep(min(0.5, timeout / 8) if timeout else 0.5)
            now = time.monotonic()
            if self.fleet is None:
                if self._former:
                    continue
                if self._rundir.called_off(self._task.launch):
                    self._start_failed("another rank has failed")
                elif self._siblings.missing(now):
                    self._start_failed("a rank's shepherd ended while the ranks were starting")
                continue
            if self._child.stopped_by_us:
                continue
            if self._jams.look(now):
                self.fleet.announce(f"jam {self._jams.times}", self._place.rank)
                if self._has_to_go(now):
                    seconds = _JAM_TIME
                    await self._kill_stuck(f"stuck in a recovery for {seconds:g} s", seconds)
                    return
            finding = self._watchdog.look(now, self._child.cpu_seconds)
            if finding == "stuck":
                await self._kill_stuck(f"stuck: no step for {timeout:g} s", timeout)
                return
            if finding == "waiting":
                self.fleet.announce(f"stuck {self._watchdog.times}", self._place.rank)
                alive = self._active - self.fleet.known("dead")
                if self._watchdog.complaints.from_all(alive, now):
                    self._child.send(STACKS_SIGNAL)
                    await asyncio.sleep(0.2)
                    self._end(
                        _TOO_MUCH,
                        "all ranks wait for each other and no step advances; their stacks are "
                        "in the logs",
                        again=True,
                    )

    def _has_to_go(self, now: float) -> bool:
        """Whether all are in a recovery that is jammed, and this rank is the one that gives way.

        A spare is missed less than a rank with the state; beyond that, who coordinates MPI's
        agreement, which is the lowest, is the likeliest to bring it to its end by going.
        """
        assert self.fleet is not None
        alive = set(range(self._place.size)) - self.fleet.known("dead")
        first = min(alive, key=lambda rank: (rank in self._active, rank))
        return first == self._place.rank and self._jams.complaints.from_all(alive, now)

    async def _kill_stuck(self, cause: str, seconds: float) -> None:
        self._child.send(STACKS_SIGNAL)
        await asyncio.sleep(0.2)
        self._kill_hung(cause, time.time() - seconds)


def _named(one: str, several: str, hosts: list[str]) -> str:
    """``n1, n1 and n2 join``."""
    names = sorted(hosts)
    listed = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{listed} {one if len(names) == 1 else several}"


def _warn_of_short_grace(step: Step, needed: float) -> None:
    job = find_job(step.job)
    for grace in graces(job) if job else ():
        if grace.seconds < _SAFETY * needed:
            print(
                f"hpcft: warning: {grace.what} leaves {grace.seconds:g} s, and this checkpoint "
                f"took {needed:.1f} s; {grace.remedy}",
                file=sys.stderr,
                flush=True,
            )


def _address(peer: Peer) -> Address:
    return Address(peer.rank, peer.address, peer.courier)
