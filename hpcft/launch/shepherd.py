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
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any, NoReturn

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore, step_of
from hpcft.errors import INTERRUPTED, TooFewRanks
from hpcft.launch.cause import Death, Ending
from hpcft.launch.channel import Message
from hpcft.launch.child import Child
from hpcft.launch.chronicle import Chronicle
from hpcft.launch.cohorts import Cohorts
from hpcft.launch.company import Company, Peer
from hpcft.launch.copies import Copies
from hpcft.launch.courier import Courier
from hpcft.launch.crew import Crew
from hpcft.launch.departure import Departures
from hpcft.launch.door import Door, Doorkeeper
from hpcft.launch.drainer import Drainer
from hpcft.launch.evaluator import Evaluator
from hpcft.launch.exporter import Exporter
from hpcft.launch.farewell import Farewell
from hpcft.launch.fleet import Fleet, Listener
from hpcft.launch.link import Link
from hpcft.launch.muster import undone
from hpcft.launch.options import RunOptions, Sizes, at_terminal
from hpcft.launch.outcome import Outcome
from hpcft.launch.place import Place, Task
from hpcft.launch.reaper import take_in
from hpcft.launch.relay import Relay
from hpcft.launch.resizing import Resizing
from hpcft.launch.roll import Roll
from hpcft.launch.scheduler import Scheduler, retire_drained
from hpcft.launch.siblings import Siblings
from hpcft.launch.signals import ENDS, WARNINGS, Meaning, Signals
from hpcft.launch.stragglers import Stragglers
from hpcft.launch.thrift import Thrift
from hpcft.launch.vigil import Vigil
from hpcft.launch.warm import Fork, Warm
from hpcft.world.departure import LEAVE, REPLACE, RESIZE, STAYS
from hpcft.world.progress import Progress

#: Seconds a fenced shepherd waits to hear from the others.
_FENCED_TIME = 60.0
#: Seconds a killed process may take to end.
_REAP_TIME = 2.0
#: Seconds a process may take to end after its main thread; and at most, if it does not hang, for
#: on a busy machine taking its memory apart takes its time.
_LINGER_TIME, _MOST_LINGER_TIME = 10.0, 120.0
#: Seconds in which the others notice that the launch was called off; who does not is signalled.
_NOTICE_TIME = 1.0
#: Exit codes of a run that somebody has ended.
_ASKED = tuple(128 + number for number in ENDS + WARNINGS)
#: Exit code of a run that cannot go on in place.
_TOO_MUCH = TooFewRanks.exit_code
#: Seconds after which it is said that a run that was asked to end is still in a step.
_STEP_TIME = 10.0
#: Seconds in which all ranks must have started MPI, and those that go by before the last of them
#: has imported what is preloaded.
_START_TIME, _PRELOAD_TIME = 300.0, 3600.0
_CALLED_OFF = "another rank has failed"
#: Seconds between two looks at whether the start has come to nothing.
_START_LOOK = 0.5


class Shepherd:
    """One rank's shepherd; :meth:`run` is the rank's life.

    Parameters
    ----------
    task: this process.
    place: of the rank; in a relaunch it may be another than the task's.
    environ: the environment of the rank, with its place in MPI.
    sizes: how many ranks train.
    warm: what the rank is forked from.
    exporter: serves the run's metrics, if this shepherd is the one to see to that.
    number: which launch of the run it is, from 1.
    former: the shepherds of the launch before this, or who this task was a guest of.
    ticket: connection to what lends the rank its place in MPI.
    lost: names of the nodes that the run has lost before.

    Attributes
    ----------
    again: after :meth:`run`: the ranks could not go on, and another launch might.
    fleet: the shepherds of this launch; None if the ranks have not met.
    step: the last that the rank had completed.
    outcome: what the launch comes to.
    farewell: says so.
    """

    def __init__(
        self,
        options: RunOptions,
        task: Task,
        place: Place,
        environ: Mapping[str, str],
        sizes: Sizes,
        warm: Warm,
        exporter: Exporter,
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
        self._exporter = exporter
        self._number = number
        self._former = former
        self._ticket = ticket
        self._lost = lost
        self.again = False
        self.fleet: Fleet | None = None
        self.outcome = Outcome()
        self._rundir = options.rundir
        self._crew = Crew(set(range(sizes.share(place.size))))
        self._chronicle = Chronicle(self._rundir, bool(options.verbose))
        self._scheduler: Scheduler | None = None
        if task.step:
            self._scheduler = Scheduler(task.step, self._rundir, bool(options.verbose))
        self._signals = Signals(options.checkpoints is not None)
        self._roll: Roll | None = None
        #: Names of the nodes that were lost while the ranks were starting.
        self._missed: frozenset[str] = frozenset()
        self._doorkeeper: Doorkeeper | None = None
        self._tiers = options.checkpoints.near if options.checkpoints else ()
        self._near = [NearStore(Path(tier.path)) for tier in self._tiers]
        self.farewell = Farewell(
            options,
            task,
            self._crew,
            self._chronicle,
            self._scheduler,
            self.outcome,
            self._near,
        )
        self._courier = Courier(place.rank, self._near)
        self._evaluator = Evaluator(warm, place.rank, self._crew, self._chronicle)
        self._drainer: Drainer | None = None
        #: Whether the script has come to its training; whether it has something to evaluate with,
        #: and that is wanted.
        self._set_up = self._evaluates = False
        self._thrift: Thrift | None = None
        self._over = asyncio.Event()
        #: What lasts no longer than the launch.
        self._tasks: list[asyncio.Future[None]] = []
        self._reaped = False
        #: Hears of the rank, once that has been forked.
        self._news: asyncio.Task[None] | None = None
        self._stop_timer: asyncio.TimerHandle | None = None
        self._dying = ""
        #: Whether the run is to end at once, for somebody has asked for that.
        self._asked = False
        #: Whether the former launch's shepherds want no other launch.
        self._final = False
        self._agreed = False
        #: Whether the ranks have left what the next launch is to go on from.
        self._handed_over = False
        self._unsaved = False

    @property
    def lost(self) -> frozenset[str]:
        """Names of the nodes that the run has lost so far."""
        assert self.fleet is not None
        return self._lost | {self.fleet.hosts[leader] for leader in self.fleet.known("lost")}

    @property
    def step(self) -> int:
        return self._progress.read().step

    @property
    def _orphaned(self) -> bool:
        """Whether what has started this process has ended."""
        return os.getppid() != self._parent

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
        self._child = Child()
        self._link = await Link.create()
        self._echo(0 if self._place.rank == 0 else None)
        loop.add_signal_handler(signal.SIGCHLD, take_in, self._warm)
        # What has ended before this.
        take_in(self._warm)
        for number in ENDS + WARNINGS:
            loop.add_signal_handler(number, self._signalled, number)
        if self._former:
            self._former.on_fact = self._check_former
            # What they have said since this was called.
            self._check_former()
        if self._ticket:
            loop.add_reader(self._ticket, self._place_lost)
        self._tasks.append(asyncio.ensure_future(self._start_rank()))
        patience = _START_TIME + (_PRELOAD_TIME if self._options.preload else 0)
        self._start_timer = loop.call_later(patience, self._start_failed, "ranks did not start MPI")
        if not self._former:
            self._tasks.append(asyncio.ensure_future(self._watch_start()))
            if self._task.ranks_here < self._place.size:
                verbose = self._options.verbose
                self._roll = Roll(self._task, self._rundir, verbose, self._start_missed)
                self._tasks.append(asyncio.ensure_future(self._roll.keep()))
        await self._over.wait()
        self._start_timer.cancel()
        self._free_spare()
        for task in self._tasks:
            task.cancel()
        if self._ticket:
            loop.remove_reader(self._ticket)
        self._child.kill()
        if self.fleet is None and self._former is None:
            await self._leave_early()
        await self._await_reaping()
        if self._news:
            self._news.cancel()
        if self.fleet:
            self._copies.cancel()
            self._stragglers.cancel()
        self._courier.close()
        # Nobody waits for it but who leaves.
        self._leaving = asyncio.ensure_future(self._relay.close())
        if self.fleet is None:
            assert self._former is not None
            self.again = not (self._final or self._asked)
            if self.again:
                self._former.announce(f"failed {self._number}", self._former.rank)
                if self._options.verbose >= 2:
                    rank = self._place.rank
                    print(f"hpcft: rank {rank}: {self.outcome.reason}", file=sys.stderr, flush=True)
            return self.outcome.decided or 1
        self.again = self._another()
        return self.outcome.code

    def _another(self) -> bool:
        """Whether this launch, which is over, is to be followed by another."""
        fenced = self.fleet is not None and self.fleet.fenced
        if fenced or self._asked or self.outcome.wish:
            return False
        wanted = self._options.max_relaunch > 0 and self.outcome.lost
        return self.outcome.resizes or wanted

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
            self.outcome.decided, self.outcome.reason = given_up
            if self._handed_over and given_up[0] in _ASKED:
                # All is saved, as when they had been asked before.
                self.outcome.decided, self.outcome.wish = INTERRUPTED, given_up[1]
        await self.fleet.leave()
        await self._leaving
        code = self.outcome.code
        speaks = self.fleet.speaks
        if speaks:
            await self.farewell.ended(
                self.fleet, self.step, self.lost, self._handed_over, self._asked
            )
        unwanted = self._asked and not self._orphaned
        over = unwanted or (code in (0, INTERRUPTED) and not self._unsaved)
        # Others on this node may go on with what is there.
        retired = not self.fleet.here() - self.fleet.retiring()
        if retired or (over and not self._handed_over):
            # After a failure, as is the death of what has started this process, the next start may
            # want them.
            for store in self._near:
                store.clear_all()
        if not speaks and self._task.starter == "mpiexec":
            # Else it would kill who tells of the end, and leaves with the exit code after that.
            return 0
        return code

    def _place_lost(self) -> None:
        """What lends places in MPI has ended: without it ranks cannot start.

        Those that have started train on and heal without it.
        """
        assert self._ticket is not None
        asyncio.get_running_loop().remove_reader(self._ticket)
        if self._former:
            self._end(_TOO_MUCH, "mpiexec or srun has ended while it relaunched", again=True)

    def _check_former(self, _: Message | None = None) -> None:
        """While this launch is starting: whether those of the former one have called it off."""
        if self.fleet or self._former is None:
            return
        for said in self._former.said("end").values():
            self._final = True
            self._start_failed(said["reason"], said["code"])
        if problem := undone(self._former, self._number):
            self._start_failed(problem)

    async def _await_reaping(self) -> None:
        """Wait a moment for the child's end: the others want to know its cause."""
        deadline = time.monotonic() + _REAP_TIME
        while self._news and not self._reaped and time.monotonic() < deadline:
            await asyncio.sleep(0.002)

    async def _watch_start(self) -> None:
        """As long as there is no channel, look whether the start has come to nothing elsewhere."""
        siblings = Siblings(self._task.ranks_here, time.monotonic())
        while True:
            await asyncio.sleep(_START_LOOK)
            if self.fleet:
                return
            looking = Errand(lambda: self._rundir.called_off(self._task.launch))
            await looking.answered()
            if looking.result():
                self._start_failed(_CALLED_OFF)
            elif siblings.missing(time.monotonic()):
                self._start_failed("a rank's shepherd ended while the ranks were starting")

    async def _start_rank(self) -> None:
        """Have the rank forked, and do what it says until its end."""
        link = self._link
        environ = {**self._relay.environ, "HPCFT_RUN": json.dumps(self._rank_options())}
        try:
            fork = await self._warm.fork(environ, (link.theirs.fileno(), self._progress.fd))
        except ProcessLookupError as error:
            await self._unforked(str(error))
            return
        finally:
            link.theirs.close()
        self._child.pid = fork.pid
        self._news = asyncio.ensure_future(self._follow(fork))
        # Of a pipe that is broken, or another shepherd that is lost: either is learnt elsewhere.
        with contextlib.suppress(OSError):
            async for message in link.messages():
                await getattr(self, f"_rank_{message['kind']}")(message)

    async def _unforked(self, why: str) -> None:
        """The rank cannot be forked."""
        deadline = time.monotonic() + _REAP_TIME
        while self._warm.pid and self._warm.ended is None and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        status = self._warm.ended
        self._ended(Ending(1, why) if status is None else self._child.end(status))

    async def _follow(self, fork: Fork) -> None:
        """Act on what becomes of the rank's process."""
        with contextlib.closing(fork):
            async for status in fork.news():
                if os.WIFSTOPPED(status):
                    self._stopped(time.time())
                elif os.WIFCONTINUED(status):
                    self._continued()
                else:
                    self._ended(self._child.end(status))

    def _rank_options(self) -> dict[str, Any]:
        """What the rank is told."""
        options = self._options
        return {
            "run_dir": str(options.run_dir),
            "spares": self._place.size - len(self._crew.active),
            "initial": self._sizes.initial,
            "min_ranks": options.min_ranks,
            "on_failure": options.on_failure,
            "mode": asdict(options.mode),
            "spares_do": options.spares_do,
            "balance": options.balance,
            "verbose": options.verbose,
            "warm": options.warm,
            "digest": options.digest,
            "checkpoints": options.checkpoints and asdict(options.checkpoints),
            "tensorboard": options.tensorboard and str(options.tensorboard),
            "restarts": self._task.step.restarts if self._task.step else 0,
            "terminal": at_terminal(),
        }

    def _echo(self, logical: int | None) -> None:
        everything = self._options.verbose >= 3
        self._warm.echo = logical == 0 or everything
        self._warm.prefix = b"" if logical == 0 else f"[{self._place.rank}] ".encode()

    # -- the rank speaks -----------------------------------------------------------------------

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
        peer = self._listener.peer(place)
        self._link.tell({"kind": "peer", "peer": vars(peer)})

    async def _rank_table(self, message: Message) -> None:
        peers = [Peer(**peer) for peer in message["peers"]]
        fleet = Fleet(
            self._place.rank,
            peers,
            self._options.timeout_detect,
            self._learned,
            self._noted,
            self._child.hold,
            self._fence,
        )
        options, crew, progress = self._options, self._crew, self._progress
        self._departures = Departures(fleet, crew, self._link.tell)
        self._cohorts = Cohorts(self._options.mode.backup, fleet.proclaim)
        least = self._options.min_ranks
        self._resizing = Resizing(fleet, crew, progress, self._over.is_set, least)
        self._stragglers = Stragglers(
            fleet, crew, self._chronicle, self._link.tell, self._options.replace_stragglers
        )
        spread = "copies" in self._options.spares_do
        self._copies = Copies(
            self._courier, fleet, crew, self._tiers, self._link.tell, spread, self._undrained
        )
        timeout = self._options.timeout_progress
        self._vigil = Vigil(
            fleet, crew, self._child, progress, timeout, self._kill_hung, self._stalled
        )
        secret = bytes.fromhex(message["secret"])
        await self._courier.listen(self._listener.courier, secret)
        if "drain" in self._options.spares_do and (gathered := self._courier.gathered):
            Errand(lambda: self._near[0].clear_gathered(gathered))
            self._drainer = Drainer(self._warm, fleet, crew, gathered, self._undrained)
        await fleet.join(self._listener, secret)
        self.fleet = fleet
        self._start_timer.cancel()
        if self._roll:
            self._leaving_roll = asyncio.ensure_future(self._roll.leave())
        self._tasks.append(asyncio.ensure_future(self._vigil.keep()))
        self._tasks.append(asyncio.ensure_future(self._exporter.keep(lambda: fleet.speaks)))
        if self._place.rank == 0:
            self._doorkeeper = Doorkeeper(self._rundir, self._door(peers, message["secret"]))
        if options.spares_memory == "auto" and (self._place.size > len(crew.active) or self._near):
            self._thrift = Thrift(
                fleet,
                crew,
                self._child,
                self._link.tell,
                self._kill_hung,
                self._near,
                self._courier,
                self._use_spare,
                self._chronicle,
                lambda: self._stragglers.step,
                coolable=options.mode.name != "async",
            )
            self._tasks.append(asyncio.ensure_future(self._thrift.keep()))
        self._link.tell({"kind": "ready"})
        # Somebody may have asked while others were still connecting.
        self._departures.renew()

    def _door(self, peers: list[Peer], secret: str) -> Door:
        options = self._options
        return Door(
            self._number,
            secret,
            tuple(peers),
            options.argv,
            os.getcwd(),
            (),
            astuple(self._sizes),
            options.min_ranks,
            "" if options.checkpoints else "start it with --ckpt-dir DIR",
        )

    async def _rank_met(self, message: Message) -> None:
        """All ranks have met, and all shepherds: those of the former launch can part."""
        assert self.fleet is not None
        if self._former:
            former, self._former = self._former, None
            self._parting = asyncio.ensure_future(former.leave())
        if self._doorkeeper:
            # The script may take long to come to its training, and others may come meanwhile.
            self._doorkeeper.open(self._warm.learnt)
        if self._scheduler and self._options.checkpoints:
            looking = retire_drained(self.fleet, self._options.min_ranks)
            self._tasks.append(asyncio.ensure_future(looking))

    async def _rank_role(self, message: Message) -> None:
        """The membership has changed: who is active, and what our rank is."""
        self._crew.active, self._crew.first = set(message["active"]), message["active"][0]
        self._crew.epoch = message["epoch"]
        self._echo(message["logical"])
        self._use_spare()
        self._departures.renew()
        self._resizing.consider()
        self._stragglers.renew()
        if self._thrift:
            self._thrift.renew()

    async def _rank_warmth(self, message: Message) -> None:
        """The rank, a spare, holds no more than it has to; or has run its script."""
        if self._thrift:
            self._thrift.heard(message["bare"])

    async def _rank_lap(self, message: Message) -> None:
        """The rank says how its last steps have taken it."""
        self._stragglers.lapped(message)

    async def _rank_probed(self, message: Message) -> None:
        """The rank, a spare that was slow, has tried how long a step takes it."""
        self._stragglers.probed(message["seconds"])

    async def _rank_at(self, message: Message) -> None:
        """The rank was asked to leave, and says how far it is."""
        assert self.fleet is not None
        if message["step"] >= 0:
            self._departures.answered(message["purpose"], message["epoch"], message["step"])
        elif message["purpose"] == LEAVE:
            # There is nothing to save yet.
            fact = self.fleet.said(LEAVE)[0]
            self._end(fact["code"], fact["reason"])

    async def _rank_ready(self, message: Message) -> None:
        """The rank has its gradients for a step; or all its steps are done."""
        assert self.fleet is not None
        self.fleet.note(self.fleet.settler(self._crew.active), **message)

    _rank_completed = _rank_ready

    async def _rank_said(self, message: Message) -> None:
        """The rank is about to end, and says why."""
        self._child.said = message["text"]
        self._child.said_so = True

    async def _rank_imported(self, message: Message) -> None:
        """The script has set up what it trains, and has imported what it needs for that."""
        if not (self._options.max_relaunch or self._options.checkpoints):
            return
        self._warm.learn(message["modules"])
        if self._doorkeeper:
            self._doorkeeper.open(self._warm.learnt)
        self._evaluates = message["evaluates"] and "evaluate" in self._options.spares_do
        self._set_up = True
        self._use_spare()

    def _use_spare(self) -> None:
        """Have the rank's processor do something useful, if the rank is a spare."""
        if self._over.is_set() or self._agreed or not self._set_up:
            return
        if self._thrift is not None and self._thrift.short:
            self._free_spare()
            return
        environ, options = self._relay.environ, self._rank_options()
        if self._evaluates and self._place.rank not in self._crew.active:
            self._evaluator.start(environ, options)
        else:
            self._evaluator.drop()
        if self._drainer:
            self._drainer.consider(environ, options)

    def _free_spare(self) -> None:
        """Have what is done beside the spare end at once."""
        self._evaluator.drop()
        if self._drainer:
            self._drainer.drop()

    def _undrained(self, checkpoint: str, why: str) -> None:
        """What the ranks have asked a spare to write, or with an empty name any, is not written."""
        assert self.fleet is not None
        rank, epoch = self._place.rank, self._crew.epoch
        step = step_of(checkpoint) if checkpoint else -1
        if checkpoint:
            self.fleet.note(self._crew.first, kind="drained", checkpoint=checkpoint, folder="")
        Errand(lambda: self._chronicle.undrained(step, epoch, rank, why))

    async def _rank_agreed(self, message: Message) -> None:
        """All ranks have agreed that training is over: from now on ranks may leave."""
        self._agreed = True
        self._free_spare()
        self._handed_over = message["handed_over"]

    async def _rank_stays(self, message: Message) -> None:
        """All ranks were to leave for others to come or go, and could not save: they train on."""
        assert self.fleet is not None
        self.fleet.announce(STAYS, self._place.rank)

    async def _rank_copy(self, message: Message) -> None:
        """The rank has written its part of a checkpoint near it; another node is to have it."""
        tier, checkpoint, files = message["tier"], message["checkpoint"], message["files"]
        self._copies.make(tier, checkpoint, files, message["drained"])

    async def _rank_finishing(self, message: Message) -> None:
        """The ranks have trained to the end, and save the last step themselves."""
        assert self.fleet is not None
        if drainer := self.fleet.drainer(self._crew.active):
            self.fleet.note(drainer.rank, kind="finishing")

    async def _rank_unsaved(self, message: Message) -> None:
        """Training is over, and the last checkpoint could not be saved but near the ranks."""
        self._unsaved = True

    async def _rank_saved(self, message: Message) -> None:
        """A checkpoint is committed."""
        if self._scheduler:
            self._scheduler.saved(message["seconds"])

    async def _rank_abort(self, message: Message) -> None:
        """The rank has found out that the run cannot go on."""
        self._end(message["code"], message["reason"], again=message["code"] == _TOO_MUCH)

    # -- the rank ends or stops ----------------------------------------------------------------

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
        if self._over.is_set() and not self.outcome.has_died(rank):
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
            loop.call_later(_LINGER_TIME, self._lingers, loop.time() + _MOST_LINGER_TIME)
        elif self._dying:
            self.fleet.announce_death(Death(self._place.rank, self._dying, self._died_at))
        elif self._progress.read().running and not self._child.said_so:
            self.fleet.announce_end(self._place.rank, at)

    def _lingers(self, deadline: float) -> None:
        """All is over, but the kernel keeps the process: a file system does not answer a thread."""
        if self._reaped or self._over.is_set():
            return
        loop = asyncio.get_running_loop()
        if not self._child.hangs() and loop.time() < deadline:
            loop.call_later(1.0, self._lingers, deadline)
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
        if self.farewell.signalled(number):
            return
        if self._over.is_set():
            # Between two launches nobody is there who could leave in order.
            if self._another():
                self._asked_to_end(number)
            return
        if self._task.joined and self.fleet and (number in ENDS or self._task.of_another_job):
            # Another job's end is not the run's.
            self._retire(number)
            return
        begun = self.fleet is not None and not self._agreed
        meaning = self._signals.meaning(number, time.monotonic(), begun and not self._orphaned)
        name = self._named(number)
        if meaning is Meaning.END:
            self._asked_to_end(number)
        elif meaning is Meaning.NOTHING:
            if self._place.rank == 0:
                print(
                    f"hpcft: {name}: there is nowhere to save to; start with --ckpt-dir DIR",
                    file=sys.stderr,
                    flush=True,
                )
        elif self.fleet and not self.fleet.known(LEAVE):
            # Of no rank in particular, so that one of all that are signalled at once gets around.
            self.fleet.announce(LEAVE, 0, reason=name, code=128 + number)

    def _named(self, number: int) -> str:
        """A signal in words; our own launcher makes one of all that ask for the end in order."""
        wish = self._task.launched_by_us and number == signal.SIGUSR1
        return "a wish to end" if wish else signal.Signals(number).name

    def _retire(self, number: int) -> None:
        """Who has joined leaves again, at a step's end; asked twice, at once."""
        assert self.fleet is not None
        if self._place.rank in self.fleet.retiring():
            # Which is a failure to the others.
            self._child.kill()
            self._warm.kill()
            os._exit(128 + number)
        self.fleet.announce("retire", self._place.rank, reason=signal.Signals(number).name)

    def _still_in_a_step(self) -> None:
        assert self.fleet is not None
        first = min(self.fleet.standing()) == self._place.rank
        if first and not self._agreed and self._options.verbose:
            print(
                f"hpcft: asked to end {_STEP_TIME:g} s ago; rank {self._place.rank} has completed "
                f"step {self.step}, and leaves when the next is done and saved; a second SIGTERM "
                "or Ctrl-C ends it at once",
                file=sys.stderr,
                flush=True,
            )

    def _asked_to_end(self, number: int) -> None:
        self._asked = True
        if self.outcome.decided is None:
            self.outcome.decided = 128 + number
        self._child.send(signal.SIGTERM)
        loop = asyncio.get_running_loop()
        reason = f"ended by {self._named(number)}"
        loop.call_later(0.05, self._end, 128 + number, reason)

    def _stalled(self, reason: str) -> None:
        self._end(_TOO_MUCH, reason, again=True)

    def _start_failed(self, reason: str, code: int = 1) -> None:
        if not self._over.is_set():
            self.outcome.decided = code or 1
            self.outcome.reason = reason
            self._over.set()

    def _start_missed(self, hosts: frozenset[str], reason: str) -> None:
        if self.fleet:
            return
        if self._rundir.called_off(self._task.launch):
            # Its shepherd has left for that.
            self._start_failed(_CALLED_OFF)
        else:
            self._missed = hosts
            self._start_failed(reason, _TOO_MUCH)

    async def _leave_early(self) -> NoReturn:
        """Leave before the ranks have met, and have all the others leave.

        What fails here often fails everywhere; the first to call the launch off speaks for all.
        """
        self._warm.kill()
        self._warm.flush()
        if self._asked and self._roll:
            # Who is asked as well is not to take this for the loss of a node.
            await self._roll.leave()
        if not self._asked and self._rundir.call_off(self._task.launch):
            if self._missed:
                self.farewell.missed(self._missed)
            else:
                print(f"hpcft: {self.outcome.reason}", file=sys.stderr, flush=True)
            # A signal could come before who is still starting can take it for what it is.
            await asyncio.sleep(_NOTICE_TIME)
            await self.farewell.upload(self._asked)
            self._task.end_all()
        os._exit(self.outcome.decided or 1)

    # -- the others speak ----------------------------------------------------------------------

    def _learned(self, fact: Message) -> None:
        kind, rank = fact["fact"], fact["rank"]
        if self._over.is_set() and (kind != "cause" or not self.outcome.has_died(rank)):
            # Deaths from now on are the end's work, and not its cause.
            return
        if kind == "dead":
            if rank in self._crew.active or rank == self._place.rank:
                # The spare may be adopted, and needs its processor now.
                self._free_spare()
            elif self.fleet and not self.fleet.known("dead") & self._crew.active:
                # Somebody has to do what another spare has done.
                self._use_spare()
            if rank == self._place.rank:
                self._child.kill()
            else:
                self._link.tell(
                    {"kind": "failed", "rank": rank, "cause": fact["cause"], "at": fact["at"]}
                )
            self.outcome.died(Death(rank, fact["cause"], fact["at"], fact["code"]))
        elif kind == "cause":
            self.outcome.explained(rank, fact["cause"], fact["code"])
            if rank != self._place.rank:
                self._link.tell({"kind": "cause", "rank": rank, "cause": fact["cause"]})
        elif kind in (LEAVE, RESIZE):
            if kind == LEAVE:
                self.outcome.wish = fact["reason"]
                self.farewell.asked_at = time.monotonic()
                asyncio.get_running_loop().call_later(_STEP_TIME, self._still_in_a_step)
            # Else the rank cannot be told yet.
            if self.fleet:
                self._departures.ask(kind)
        elif kind in ("guest", "retire"):
            self._resizing.consider()
        elif kind.startswith("at "):
            self._departures.heard(fact)
        elif kind.startswith(f"{REPLACE} "):
            # The spare may take a slow rank's place.
            self._free_spare()
            # Else the rank cannot be told yet.
            if self.fleet:
                self._departures.have_replaced()
        elif kind in ("slow", "probed"):
            self._stragglers.heard(fact)
        elif kind == "done":
            self.outcome.ended(rank, Ending(fact["code"], fact["cause"]))
        elif kind in ("end", "over"):
            if self.outcome.decided is None:
                self.outcome.decided = fact["code"]
            self.outcome.reason = fact["reason"]
            self.outcome.again = kind == "over"
            self._over.set()
        elif kind.startswith("stuck"):
            self._vigil.heard_stuck(rank)
        elif kind.startswith("jam"):
            self._vigil.heard_jam(rank)
        self._check_over()

    def _noted(self, note: Message) -> None:
        """Something for the moment: a rank's pace, what is to be settled here, or is settled."""
        if note["kind"] in ("cohort", "drained"):
            self._link.tell(note)
        elif note["kind"] == "pace":
            self._stragglers.noted(note)
        elif note["kind"] == "finishing":
            if self._drainer:
                # What it is writing would only be in the way.
                self._drainer.drop()
        else:
            self._cohorts.heard(note)

    def _check_over(self) -> None:
        if self.fleet is None:
            return
        dead, done = self.fleet.known("cause"), self.fleet.known("done")
        if len(dead | done) == self._place.size:
            self._over.set()

    def _fence(self, reason: str) -> None:
        self._child.kill()
        self._free_spare()
        if self._over.is_set():
            return
        if self._options.verbose >= 2:
            print(f"hpcft: rank {self._place.rank}: {reason}", file=sys.stderr, flush=True)
        # The others decide how the run ends. Should the link heal, we learn of it in time to leave
        # with their exit code.
        asyncio.get_running_loop().call_later(_FENCED_TIME, self._give_up)

    def _give_up(self) -> None:
        self.outcome.decided = 4
        self._over.set()

    def _end(self, code: int, reason: str, again: bool = False) -> None:
        fact = "over" if again and self._options.max_relaunch else "end"
        if self._former:
            self._former.announce(fact, self._former.rank, code=code, reason=reason)
        if self.fleet is None:
            self._start_failed(reason, code)
        else:
            self.fleet.announce(fact, self._place.rank, code=code, reason=reason)
