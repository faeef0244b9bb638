"""The training job: runs the user's loop, and runs on when ranks fail."""

from __future__ import annotations

import contextlib
import enum
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy
import torch
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

from hpcft.errors import FailedAtStart, HpcftError
from hpcft.train.averaging import averaging_hook
from hpcft.train.buckets import Buckets
from hpcft.train.checkpoints import Checkpoints, Plan
from hpcft.train.console import ProgressLine
from hpcft.train.process_group import WorldProcessGroup, install
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.state import Savepoint, State
from hpcft.train.transfer import Arrival, give
from hpcft.world.link import Failure
from hpcft.world.recovery import Recovered, Report, Transfer, state_lost
from hpcft.world.session import Session

OnShrink = Literal["keep-lr", "scale-lr", "keep-global-batch"]


class Outcome(enum.Enum):
    """How a stretch of training ended.

    OVER: all ranks have agreed that training is over.
    AGREED: all have agreed to recover.
    BROKEN_OFF: this rank has met a failure; the others do not know yet.
    """

    OVER = enum.auto()
    AGREED = enum.auto()
    BROKEN_OFF = enum.auto()


#: Steps a spare tries out, and how many it tries to come to a step of every module.
_DRY_STEPS = 2
_MOST_DRY_STEPS = 16

#: Seconds that rank 0 gets to write down how the run ended.
_LAST_WORDS = 1.0


class StepInterrupted(BaseException):
    """A rank has failed; the step is broken off at one of its two edges.

    Not an Exception, so that a training loop's ``except Exception`` lets it pass.
    """


class _DryRunOver(BaseException):
    """The dry steps are done."""


class Job:
    """This process's part in a training that survives failures. Made by :func:`hpcft.init`.

    A step is a transaction. A failure surfaces only at its two edges: before the first
    ``optimizer.step()``, when nothing tracked has changed yet, and at the end of
    ``state.commit()``, when all has. In between the collectives of a broken world do nothing, so
    that the script comes to the next edge by itself.
    """

    def __init__(self, session: Session, seed: int, on_shrink: OnShrink) -> None:
        self._session = session
        self._world = session.world
        self._seed = seed
        self._on_shrink = on_shrink
        options = session.options
        self._line = ProgressLine(options["terminal"]) if options["verbose"] else None
        self._launched_size = len(self._world.membership.active)
        self.group = WorldProcessGroup(0, self._launched_size, self._world.progress)
        #: Factor this rank's gradients are multiplied with before they are added up.
        self.scale = 1 / self._launched_size
        self._stepped = 0
        self._broken = False
        self._whole = True
        #: Whether this process has the state all begin with, which is rank 0's.
        self._begun = self._world.logical == 0
        self._dry = 0
        self._idle: set[torch.optim.Optimizer] | None = None
        self._savepoint: Savepoint | None = None
        self._samplers: list[ElasticBatchSampler] = []
        self._shared_buffers: list[torch.Tensor] = []
        self._raised: dict[int, tuple[int, str]] = {}
        self._warmed = False
        self._unsaid: list[str] = []
        if self._world.active is None:
            # Like the last rank: script code for rank 0 (printing, saving) is not run on spares.
            self.group.park(self._launched_size - 1, self._launched_size)
        else:
            self.group.attach(self._world.active)
            self.group.refuse = self._refuse
        wanted = options["checkpoints"]
        self._checkpoints = Checkpoints(Plan.of(wanted), self._report) if wanted else None
        self._world.restorable = bool(wanted)
        install(self.group)

    @property
    def rank(self) -> int:
        """Logical rank of this process; a parked spare says it is the last."""
        logical = self._world.logical
        return self.size - 1 if logical is None else logical

    @property
    def size(self) -> int:
        """Number of ranks that train."""
        return len(self._world.membership.active)

    @property
    def spare(self) -> bool:
        """Whether this process is a parked spare."""
        return self._world.logical is None

    def run(self, train: Callable[[State], None], state: State) -> None:
        """Train, whatever happens to the ranks.

        ``train(state)`` is called, and called again after every recovery; it must go on from where
        ``state`` says. This method returns in all ranks once all have returned from ``train``; on
        spares that were not needed it ends the process.

        Raises
        ------
        TooFewRanks: fewer ranks are left than the run may go on with.
        StateLost: no survivor has a whole copy of the state.
        FailedAtStart: a rank failed before, in the middle of the script's own collectives.
        """
        self._bind(state)
        self.group.refuse = None
        self._warmed = not self.spare
        if self.spare and self._session.options["warm"]:
            self._warm_up(train, state)
        outcome = self._stretch(train, state)
        while outcome is not Outcome.OVER:
            if not self._warmed:
                self._warm_up(train, state)
            elif not self.spare and not self._buckets.settled:
                self._settle(train, state)
            try:
                self._recover(state, outcome is Outcome.AGREED)
            except HpcftError:
                # The run ends; what came before that is to be told.
                if self._session.journal:
                    self._say(self._session.journal.tell(patience=0))
                if self._world.logical != 0:
                    # The first to say so ends all, also rank 0 while it is telling.
                    time.sleep(_LAST_WORDS)
                raise
            outcome = self._stretch(train, state)
        self._finish(state)

    def _bind(self, state: State) -> None:
        """Have the state's edges lead here."""
        if not list(state.optimizers()):
            raise HpcftError(
                "the state tracks no optimizer", "give it to hpcft.State(optimizer=...)"
            )
        for module in state.modules():
            module.register_forward_pre_hook(self._before_forward)
            if isinstance(module, DistributedDataParallel):
                module.register_comm_hook(self, averaging_hook)
                if module.broadcast_buffers:
                    # Its forward would give rank 0's buffers to all at the start of the next step,
                    # too late if rank 0 dies before.
                    module.broadcast_buffers = False
                    self._shared_buffers += list(module.buffers())
        self._buckets = Buckets(state.modules())
        for optimizer in state.optimizers():
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        state.__dict__["_commit"] = lambda metrics: self._commit(state, metrics)
        self._samplers = [p for p in state.parts.values() if isinstance(p, ElasticBatchSampler)]
        if self._on_shrink == "keep-global-batch" and len(self._samplers) != 1:
            raise HpcftError(
                'on_shrink="keep-global-batch" needs to know the batches',
                "track exactly one hpcft.ElasticBatchSampler in the state",
            )
        self._place(state)
        self._savepoint = Savepoint(state)

    def _place(self, state: State) -> None:
        """Tell the samplers who we are, and begin the step that the state is at."""
        for sampler in self._samplers:
            keep = self._on_shrink == "keep-global-batch"
            whole = sampler.batch_size * self._launched_size if keep else None
            sampler.place(self.rank, self.size, whole)
        self._begin_step(state)

    def _begin_step(self, state: State) -> None:
        self._stepped = 0
        self._broken = False
        self.scale = 1 / self.size
        if len(self._samplers) == 1:
            # Exact also where the ranks' batches differ in size.
            sampler = self._samplers[0]
            self.scale = sampler.local_count / sampler.global_count
        self._step_seed = random.Random(f"{self._seed} {self.rank} {state.step}").getrandbits(63)
        self._seed_generators()
        self._seeded_forward = False

    def _seed_generators(self) -> None:
        # Not torch.manual_seed, which formats a stack trace for each accelerator not in use.
        torch.default_generator.manual_seed(self._step_seed)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(self._step_seed)
        numpy.random.seed(self._step_seed & 0xFFFFFFFF)
        random.seed(self._step_seed)

    def _before_forward(self, *_: object) -> None:
        # Again, for a loader that is made anew after a failure has drawn a number meanwhile.
        if not self._seeded_forward:
            self._seeded_forward = True
            self._seed_generators()

    # -- the edges of a step -------------------------------------------------------------------

    def _failed(self) -> bool:
        if self.group.failure is not None and self._world.link is None:
            raise self.group.failure
        return self.group.failure is not None or self._world.broken()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._dry:
            return
        if self._idle is not None:
            self._idle.discard(optimizer)
            if not self._idle:
                raise _DryRunOver
            # Without gradients it changes nothing.
            optimizer.zero_grad(set_to_none=True)
            return
        if self._stepped == 0 and self._shared_buffers:
            self._share_buffers()
        if not self._failed():
            if self._checkpoints:
                self._checkpoints.before_update()
            return
        if self._stepped == 0:
            raise StepInterrupted
        # Another optimizer has stepped already, and this one steps on gradients nobody added up.
        self._broken = True

    def _share_buffers(self) -> None:
        """Have all ranks go on with rank 0's buffers (running means), as part of the step."""
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in self._shared_buffers:
            by_type.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_type.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            self.group.broadcast([flat]).wait()
            parts = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))

    def _after_step(self, *_: object) -> None:
        self._stepped += 1

    def _commit(self, state: State, metrics: dict[str, float]) -> None:
        if self._idle is not None:
            raise _DryRunOver
        if self._dry:
            self._buckets.settle()
            self._dry -= 1
            enough = self._dry <= _MOST_DRY_STEPS - _DRY_STEPS and self._buckets.settled
            if enough or not self._dry:
                raise _DryRunOver
            return
        state.__dict__["step"] += 1
        for sampler in self._samplers:
            sampler.advance()
        # A collective that failed after the optimizer's step has given its caller a wrong answer;
        # one that failed in a step without any optimizer's step, wrong gradients to who knows what.
        self._whole = self.group.failure is None
        self._broken = self._broken or (not self._whole and self._stepped == 0)
        assert self._savepoint is not None
        self._savepoint.renew()
        self._world.progress.step(state.step)
        if self._line and self._unsaid:
            for said in self._unsaid:
                self._line.say(said)
            self._unsaid.clear()
        if self._session.journal:
            self._say(self._session.journal.stepped(state.step))
        if self._line and self._world.logical == 0:
            self._line.step(state.step, self.size, metrics)
        if not self._buckets.settled:
            self._buckets.settle()
        if self._failed():
            raise StepInterrupted
        if self._checkpoints:
            with self._waiting():
                self._checkpoints.edge(state)
        self._begin_step(state)

    # -- between failures ----------------------------------------------------------------------

    def _stretch(self, train: Callable[[State], None], state: State) -> Outcome:
        """Train, or wait as a spare, until all is over or somebody fails."""
        self._world.progress.run(not self.spare)
        if self.spare:
            return Outcome.OVER if self._world.park() else Outcome.AGREED
        try:
            if self._world.membership.epoch == 0:
                self._start(state)
            train(state)
            if self._checkpoints:
                with self._waiting():
                    self._checkpoints.finish(state)
        except StepInterrupted:
            return Outcome.BROKEN_OFF
        except MPI.Exception:
            return Outcome.BROKEN_OFF
        except Exception:
            # What a script does with the results of a broken world says nothing about the script.
            if not self._failed():
                raise
            self._broken = self._broken or self._stepped > 0
            if self._line:
                self._line.say("hpcft: dropped, as a rank has failed: " + traceback.format_exc())
            return Outcome.BROKEN_OFF
        return Outcome.OVER if self._world.finish() else Outcome.AGREED

    def _start(self, state: State) -> None:
        """Have all ranks begin with the state of rank 0."""
        assert self._world.active is not None
        comm = self._world.active
        if self._session.journal:
            self._session.journal.started()
        if self._checkpoints and comm.rank == 0:
            self._checkpoints.restore(state)
        with self._waiting():
            if comm.size > 1 and not state.sharded():
                everybody = Transfer(0, tuple(range(1, comm.size)), 0, 0)
                if comm.rank == 0:
                    give(comm, everybody, state.take_apart())
                else:
                    arrival = Arrival(state, in_place=True)
                    arrival.receive(comm, everybody)
                    arrival.install()
        if self._checkpoints:
            self._checkpoints.check(state)
            self._checkpoints.attach(comm, state)
        self._place(state)
        assert self._savepoint is not None
        self._savepoint.renew()
        self._begun = True

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around what may wait for other ranks, for the watchdog to know."""
        self._world.progress.enter()
        try:
            yield
        finally:
            self._world.progress.leave()

    def _report(self, kind: str, step: int, detail: dict[str, Any]) -> None:
        """Write down, and in rank 0 say, what has become of a checkpoint."""
        if self._session.journal:
            self._session.journal.note(kind, step, detail)
        if self._line and (said := _checkpoint_in_words(kind, step, detail)):
            if self._world.logical == 0:
                self._line.say(said)
            else:
                # A spare that is being adopted is not heard yet.
                self._unsaid.append(said)

    def _warm_up(self, train: Callable[[State], None], state: State) -> None:
        """Run a few steps for nobody, so that all that is made on first use is made."""
        self._dry = _MOST_DRY_STEPS
        try:
            train(state)
        except _DryRunOver:
            pass
        except Exception:
            print("hpcft: the dry steps of a spare failed:", file=sys.stderr)
            traceback.print_exc()
        self._dry = 0
        self._warmed = True

    def _settle(self, train: Callable[[State], None], state: State) -> None:
        """Begin a step for nobody, as a failure came before this rank had completed a first one."""
        self.group.failure = self.group.failure or MPI.Exception(MPI.ERR_REVOKED)
        self._idle = set(state.optimizers())
        try:
            train(state)
        except _DryRunOver:
            pass
        except Exception:
            print("hpcft: a dry step of a survivor failed:", file=sys.stderr)
            traceback.print_exc()
        self._idle = None
        self._buckets.settle()

    # -- failures ------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Give up on a failure before :meth:`run`.

        What the script's collectives have given it so far may already differ between the ranks,
        and a spare, which parks with collectives of its own, has none of it.
        """
        if self._world.link is None:
            return
        self._world.link.news.wait(_LAST_WORDS)
        dead = [
            f"rank {logical} ({failure.cause or 'cause unknown'})"
            for world, failure in sorted(self._world.link.failures.items())
            if (logical := self._world.membership.logical(world)) is not None
        ]
        raise FailedAtStart(
            f"{', '.join(dead) or 'a rank'} failed before job.run, while the script was setting up",
            "start the run again: no step of it is lost",
        )

    def _recover(self, state: State, agreed: bool) -> None:
        was_spare = self.spare
        world, link = self._world, self._world.link
        assert link is not None
        assert self._savepoint is not None
        if self._checkpoints:
            self._checkpoints.drop()
        if not was_spare and not self._broken:
            self._savepoint.restore()
        report = Report(
            world.world,
            state.step if self._begun else -1,
            whole=self._whole,
            broken=self._broken or state.sharded(),
        )
        arrival = Arrival(state, in_place=was_spare)

        def transfer(comm: MPI.Intracomm, plan: Transfer) -> None:
            if comm.rank == plan.source:
                if plan.step < 0:
                    self._restore(state)
                give(comm, plan, state.take_apart())
            elif comm.rank in plan.receivers:
                arrival.receive(comm, plan)

        before = self.size
        recovery = world.recover(report, transfer, agreed)
        if world.logical is not None:
            assert world.active is not None
            if world.logical in recovery.transfer.receivers:
                arrival.install()
            self.group.attach(world.active)
            if self._on_shrink == "scale-lr" and self.size != before:
                _scale_learning_rate(state, self.size / before)
            # What was restored has a step nobody could know when it was planned.
            recovery.transfer = replace(recovery.transfer, step=state.step)
            self._whole = self._begun = True
            self._place(state)
            self._savepoint = Savepoint(state)
            if self._checkpoints:
                self._checkpoints.attach(world.active, state)
        link.send("role", logical=world.logical, active=world.membership.active)
        if self._session.journal:
            self._session.journal.recovered(recovery)
        self._give_up_on_repetition(recovery)

    def _restore(self, state: State) -> None:
        """Bring back from a file what no survivor has."""
        if not (self._checkpoints and self._checkpoints.restore(state)):
            raise state_lost()

    def _say(self, told: list[Recovered]) -> None:
        if self._line and self._world.logical == 0:
            assert self._world.link is not None
            for recovery in told:
                self._line.say(_in_words(recovery, self._world.link.failures, self._world.hosts))

    def _give_up_on_repetition(self, recovery: Recovered) -> None:
        """A script that raises wherever and by whomever it is run is not a failure to heal."""
        link = self._world.link
        assert link is not None
        for logical in recovery.healing.failed:
            # MPI can have told of it before the shepherd's message has been read.
            patience = 0.5 if self._world.logical == 0 else 0.0
            failure = link.failure(recovery.healing.before.active[logical], patience)
            if failure and failure.cause.startswith("exit code"):
                here = (recovery.transfer.step, failure.cause)
                if self._raised.get(logical) == here:
                    raise HpcftError(
                        f"rank {logical} failed twice at step {here[0]} in the same way: {here[1]}",
                        f"see the log of process {failure.rank} in the run directory",
                    )
                self._raised[logical] = here

    # -- the end -------------------------------------------------------------------------------

    def _finish(self, state: State) -> None:
        self._world.progress.run(False)
        if self._world.link:
            self._world.link.send("agreed")
        if self.spare:
            raise SystemExit(0)
        if self._session.journal:
            self._say(self._session.journal.tell(patience=0))
            wanted = self._session.options["digest"] and self._world.logical == 0
            self._session.journal.finished(state.step, state.digest() if wanted else None)


def _checkpoint_in_words(kind: str, step: int, detail: Mapping[str, Any]) -> str:
    if kind == "restore":
        return f"hpcft: going on from step {step}, restored from {detail['path']}"
    if kind == "damaged":
        return f"hpcft: the checkpoint of step {step} is no good: {detail['why']}"
    if kind == "save failed":
        return f"hpcft: {detail['why']}; training goes on without it"
    return ""


def _scale_learning_rate(state: State, factor: float) -> None:
    for part in state.parts.values():
        if isinstance(part, torch.optim.Optimizer):
            for settings in part.param_groups:
                settings["lr"] *= factor
                if "initial_lr" in settings:
                    settings["initial_lr"] *= factor
        elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
            part.base_lrs = [lr * factor for lr in part.base_lrs]


def _in_words(
    recovery: Recovered, failures: Mapping[int, Failure], hosts: Mapping[int, str]
) -> str:
    healing = recovery.healing
    adopted = {adoption.failed: adoption.world for adoption in healing.adoptions}
    said = []
    for world in healing.dead:
        failure = failures.get(world)
        logical = healing.before.logical(world)
        name = f"spare {world}" if logical is None else f"rank {logical}"
        then = ""
        if world in adopted:
            then = f", process {adopted[world]} on {hosts[adopted[world]]} took over"
        said.append(f"{name} on {hosts[world]} failed ({failure.cause if failure else '?'}){then}")
    active, spares = len(healing.after.active), len(healing.after.spares)
    milliseconds = 1000 * (recovery.ended - recovery.began)
    return (
        f"hpcft: {'; '.join(said)}. Going on at step {recovery.transfer.step} with {active} ranks "
        f"and {spares} spares, recovered in {milliseconds:.0f} ms"
    )
