"""The training job: runs the user's loop, and runs on when ranks fail."""

from __future__ import annotations

import enum
import random
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy
import torch
from mpi4py import MPI
from torch.nn.parallel import DistributedDataParallel

from hpcft.errors import INTERRUPTED, HpcftError, StateLost
from hpcft.train.accelerator import in_use
from hpcft.train.asynchronous import Asynchronous
from hpcft.train.averaging import averaging_hook
from hpcft.train.backup import Backup, Late, backup_hook
from hpcft.train.balance import Balance
from hpcft.train.buckets import Buckets
from hpcft.train.checkpoints import CommRanks
from hpcft.train.evaluation import Evaluate
from hpcft.train.interruption import StepInterrupted
from hpcft.train.lasting import Lasting
from hpcft.train.localsgd import LocalSgd
from hpcft.train.process_group import WorldProcessGroup, install
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.state import Savepoint, State
from hpcft.train.transfer import Arrival, give
from hpcft.world import garbage, warm
from hpcft.world.departure import Departure, Replacement
from hpcft.world.membership import Healing
from hpcft.world.recovery import Recovered, Report, Transfer, state_lost
from hpcft.world.script import ScriptInterrupted

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

#: Steps by which a spare tries how fast it is; the time of the first is not taken.
_TRIAL_STEPS = 10

#: Seconds that rank 0 gets to write down how the run ended.
_LAST_WORDS = 1.0


class _Leaving(BaseException):
    """All leave at the end of this step, for the run was asked to end."""


class _Replacing(BaseException):
    """At the end of this step slow ranks change places with spares."""


class _DryRunOver(BaseException):
    """The dry steps are done."""


class Job:
    """This process's part in a training that survives failures. Made by :func:`hpcft.init`.

    A step is a transaction. A failure surfaces only at its two edges: before the first
    ``optimizer.step()``, when nothing tracked has changed yet, and at the end of
    ``state.commit()``, when all has. In between the collectives of a broken world do nothing, so
    that the script comes to the next edge by itself.
    """

    def __init__(self, lasting: Lasting, seed: int, on_shrink: OnShrink) -> None:
        self._session = lasting.session
        self._options = lasting.session.options
        self._world = lasting.session.world
        self._teller = lasting.teller
        self._pace = lasting.pace
        self._repetition = lasting.repetition
        self._checkpoints = lasting.checkpoints
        self._seed = seed
        self._on_shrink = on_shrink
        #: How many ranks trained at first.
        self._launched_size = self._options["initial"] or len(self._world.launched.active)
        #: The membership that this run of the script was made for.
        self._epoch = self._world.membership.epoch
        #: Whether all have agreed that the script is run anew.
        self._left = False
        self.group = WorldProcessGroup(0, self.size, self._world.progress)
        #: Factor this rank's gradients are multiplied with before they are added up.
        self.scale = 1 / self.size
        self.own_gradients = lasting.session.mode.own_gradients
        self._local: LocalSgd | None = None
        self._free: Asynchronous | None = None
        #: Whether ranks train without MPI at present, each at a step of its own.
        self._apart = False
        #: Among how many ranks the samplers share out the data.
        self._dealt = self.size
        self._stepped = 0
        self._broken = False
        self._whole = True
        #: Whether this process has the state all begin with, which is rank 0's.
        self._begun = self._world.logical == 0
        self._dry = 0
        self._idle: set[torch.optim.Optimizer] | None = None
        self._savepoint: Savepoint | None = None
        self._backup: Backup | None = None
        if lasting.session.mode.name == "backup" and self._world.link:
            cohorts, failed = self._world.link.cohorts, self._failed_here_or_there
            self._backup = Backup(self.group, self._world, cohorts, failed)
        self._samplers: list[ElasticBatchSampler] = []
        self._balance: Balance | None = None
        self._shared_buffers: list[torch.Tensor] = []
        self._warmed = False
        self._leaving = False
        self._steps_down = False
        #: When the dry steps of a trial were done; None if there is no trial.
        self._trial: list[float] | None = None
        if self._world.active is None:
            # Like the last rank: script code for rank 0 (printing, saving) is not run on spares.
            self.group.park(self.size - 1, self.size)
        else:
            self.group.attach(self._world.active)
            self.group.refuse = self._refuse
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

    def run(
        self, train: Callable[[State], None], state: State, evaluate: Evaluate | None = None
    ) -> None:
        """Train, whatever happens to the ranks.

        ``train(state)`` is called, and called again after every recovery; it must go on from where
        ``state`` says. This method returns in all ranks once all have returned from ``train``; on
        spares that were not needed it ends the process.

        Parameters
        ----------
        evaluate: called with the state of each new checkpoint, its modules in eval mode and without
            gradients, in a process beside a parked spare, if ``--spares-do evaluate`` asks for
            that; returns metrics by name. Ranks never call it; a script may do so when this method
            has returned.

        Raises
        ------
        TooFewRanks: fewer ranks are left than the run may go on with.
        StateLost: no survivor has a whole copy of the state, and there is no checkpoint.
        ScriptInterrupted: the script has to be run anew; let it pass.
        """
        if self._left:
            raise HpcftError(
                "this job is that of a former run of the script",
                "call hpcft.init() in the script itself, not in a module that it imports",
            )
        garbage.as_usual()
        if self._world.link:
            given = evaluate is not None
            self._world.link.send("imported", modules=warm.libraries(), evaluates=given)
            if not given and "evaluate" in self._options["spares_do"] and self.rank == 0:
                self._teller.say("hpcft: --spares-do evaluate: job.run() is given no evaluate=...")
        self._bind(state)
        self.group.refuse = None
        self._warmed = not self.spare
        if self.spare and self._options["warm"]:
            self._warm_up(train, state)
        outcome = self._stretch(train, state)
        while outcome is not Outcome.OVER:
            # A script with shards is run anew.
            if not self._warmed and not state.sharded():
                self._warm_up(train, state)
            elif not self.spare and not self._buckets.settled:
                self._settle(train, state)
            self._recover(state, outcome is Outcome.AGREED)
            outcome = self._stretch(train, state)
        self._finish(state)

    def _bind(self, state: State) -> None:
        """Have the state's edges lead here."""
        self._state = state
        if not list(state.optimizers()):
            raise HpcftError(
                "the state tracks no optimizer", "give it to hpcft.State(optimizer=...)"
            )
        for module in state.modules():
            module.register_forward_pre_hook(self._before_forward)
            if isinstance(module, DistributedDataParallel):
                if self._backup:
                    module.register_comm_hook(self._backup, backup_hook)
                else:
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
        state.__dict__["_save"] = lambda overlap: self._save(state, overlap)
        self._samplers = [p for p in state.parts.values() if isinstance(p, ElasticBatchSampler)]
        if self._on_shrink == "keep-global-batch" and len(self._samplers) != 1:
            raise HpcftError(
                'on_shrink="keep-global-batch" needs to know the batches',
                "track exactly one hpcft.ElasticBatchSampler in the state",
            )
        if self._options.get("balance"):
            if len(self._samplers) != 1:
                raise HpcftError(
                    "--balance needs to know the batches",
                    "track exactly one hpcft.ElasticBatchSampler in the state",
                )
            if state.sharded():
                raise HpcftError(
                    "--balance needs DistributedDataParallel, which averages by samples; sharded "
                    "modules average by ranks",
                    "leave it away",
                )
            self._balance = Balance(self._samplers[0])
        self._choose_mode(state)
        self._place(state)
        self._savepoint = Savepoint(state)

    def _choose_mode(self, state: State) -> None:
        """Make what the mode needs."""
        mode = self._session.mode
        if mode.own_gradients and state.sharded():
            raise HpcftError(
                f"--mode {mode.name} needs all of the state in each rank, and this one is sharded",
                "leave --mode away, or train with DistributedDataParallel",
            )
        if self._backup:
            sampler = self._samplers[0] if len(self._samplers) == 1 else None
            self._backup.bind(state, sampler, self._before_the_step)
        elif mode.name == "local-sgd":
            self._local = LocalSgd(self.group, mode.sync_every, mode.elastic, state)
            if self._checkpoints:
                self._checkpoints.beginning = self._average
        elif mode.name == "async" and self._world.link:
            self._free = Asynchronous(self._session, state, self._healed, self._before_change)
            self._world.apart = True

    def _before_the_step(self) -> AbstractContextManager[None]:
        assert self._savepoint is not None
        return self._savepoint.brought_back()

    def _average(self) -> None:
        """Have all ranks hold the same, for what is saved is to be the average."""
        if self._local:
            with self._world.progress.waiting():
                self._local.average()
            if self._failed_here_or_there():
                raise MPI.Exception(MPI.ERR_REVOKED)
            assert self._savepoint is not None
            self._savepoint.renew()

    def _before_change(self) -> None:
        if self._checkpoints:
            self._checkpoints.before_update()

    def _place(self, state: State) -> None:
        """Tell the samplers who we are, and begin the step that the state is at."""
        self._deal()
        if self._local:
            self._local.begin()
        self._begin_step(state)

    def _deal(self) -> None:
        """Share out the data to those that train now."""
        for sampler in self._samplers:
            keep = self._on_shrink == "keep-global-batch"
            whole = sampler.batch_size * self._launched_size if keep else None
            sampler.place(self.rank, self.size, whole)
        self._dealt = self.size

    def _begin_step(self, state: State) -> None:
        self._stepped = 0
        self._broken = False
        self.scale = 1 / self.size
        self._counts = 1, self.size
        if len(self._samplers) == 1:
            # Exact also where the ranks' batches differ in size.
            sampler = self._samplers[0]
            self._counts = sampler.local_count, sampler.global_count
            self.scale = sampler.local_count / sampler.global_count
        if self._backup:
            together = self.spare or not self._buckets.settled
            self._backup.begin(state.step, self.scale, together)
        self._step_seed = random.Random(f"{self._seed} {self.rank} {state.step}").getrandbits(63)
        self._seed_generators()
        self._seeded_forward = False
        self._pace.begin()

    def _seed_generators(self) -> None:
        # Not torch.manual_seed, which formats a stack trace for each accelerator not in use.
        torch.default_generator.manual_seed(self._step_seed)
        if module := in_use():
            module.manual_seed_all(self._step_seed)
        numpy.random.seed(self._step_seed & 0xFFFFFFFF)
        random.seed(self._step_seed)

    def _needed(self) -> bool:
        """Whether the others may want something of this spare."""
        return self._world.broken() or self._world.called()

    def _before_forward(self, *_: object) -> None:
        if self._trial is not None and self._needed():
            raise _DryRunOver
        # Again, for a loader that is made anew after a failure has drawn a number meanwhile.
        if not self._seeded_forward:
            self._seeded_forward = True
            self._seed_generators()

    # -- the edges of a step -------------------------------------------------------------------

    def _failed(self) -> bool:
        if self._apart:
            return False
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
        if self._stepped == 0:
            self._see_that_in_time()
            if self._shared_buffers and not self.own_gradients:
                self._share_buffers()
        if not self._failed():
            if self._checkpoints:
                self._checkpoints.before_update()
            return
        if self._stepped == 0:
            raise StepInterrupted
        # Another optimizer has stepped already, and this one steps on gradients nobody added up.
        self._broken = True

    def _see_that_in_time(self) -> None:
        """This rank's gradients may have been too late for the step, which others have made."""
        if self._backup and self._backup.late():
            raise StepInterrupted if self._failed() else Late

    def _share_buffers(self) -> None:
        """Have all ranks go on with rank 0's buffers (running means), as part of the step."""
        alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for buffer in self._shared_buffers:
            alike.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        for buffers in alike.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            if not (self._backup and self._backup.share_buffers(flat)):
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
            if self._trial is not None:
                self._trial.append(time.monotonic())
                if self._dry and not self._needed():
                    return
                raise _DryRunOver
            enough = self._dry <= _MOST_DRY_STEPS - _DRY_STEPS and self._buckets.settled
            if enough or not self._dry:
                raise _DryRunOver
            return
        self._see_that_in_time()
        state.__dict__["step"] += 1
        epochs = [sampler.epoch for sampler in self._samplers]
        samples = self._samplers[0].local_count if self._balance else 0
        for sampler in self._samplers:
            sampler.advance(self._backup.taken() if self._backup else None)
        # A collective that failed after the optimizer's step has given its caller a wrong answer;
        # one that failed in a step without any optimizer's step, wrong gradients to who knows what.
        self._whole = self.group.failure is None
        self._broken = self._broken or (not self._whole and self._stepped == 0)
        if self._local:
            self._local.stepped(*self._counts)
        elif self._apart:
            self._exchange(state, epochs)
        assert self._savepoint is not None
        self._savepoint.renew()
        self._world.progress.step(state.step)
        self._pace.committed(state.step, metrics)
        self._teller.stepped(state.step, self.size, metrics)
        if not self._buckets.settled:
            self._buckets.settle()
        if self._failed():
            raise StepInterrupted
        if self._backup:
            self._backup.hand_on()
        if self._checkpoints:
            self._checkpoints.edge(state, metrics)
        self._leave_if_asked(state)
        if self._apart and self._free:
            self._free.hold()
        if self._balance:
            with self._world.progress.waiting():
                weights = self._balance.edge(state.step, samples, self._pace.computed)
            if weights:
                self._teller.shared_out(state.step, weights)
        self._pace.ended()
        self._begin_step(state)

    def _leave_if_asked(self, state: State) -> None:
        if link := self._world.link:
            for departure in link.departures.asked():
                self._leave_or_go_on(state, departure)
            if link.departures.replacement.asked:
                self._replace_or_go_on(state, link.departures.replacement)

    def _leave_or_go_on(self, state: State, departure: Departure) -> None:
        """All are to leave; see whether this is the step they leave at."""
        if self._apart:
            # Each at a step of its own.
            raise _Leaving
        with self._world.progress.waiting():
            over = departure.over(state.step, self._failed_here_or_there)
        if over:
            raise _Leaving
        if self._failed_here_or_there():
            raise StepInterrupted

    def _replace_or_go_on(self, state: State, replacement: Replacement) -> None:
        """Slow ranks are to change places with spares; see whether this is the step for that."""
        with self._world.progress.waiting():
            over = replacement.over(state.step, self._failed_here_or_there)
        if over and (state.sharded() or not self.group.healable):
            # That would cost all a start of their scripts; the same is found by all.
            replacement.forget()
            if self.rank == 0:
                what = "its state is sharded" if state.sharded() else "it uses groups of some ranks"
                self._teller.say(f"hpcft: no rank is replaced while this script runs, as {what}")
        elif over:
            self._steps_down = self._world.world in replacement.worlds
            self._world.gather()
            raise _Replacing
        elif self._failed_here_or_there():
            raise StepInterrupted

    def _exchange(self, state: State, epochs: list[int]) -> None:
        """Send the others what this rank has learnt, and take what they have."""
        assert self._free is not None
        # Of those that there are now; the data was shared out to those that there were.
        self._free.stepped(self.scale * self._dealt / self.size)
        if epochs != [sampler.epoch for sampler in self._samplers] and self._dealt != self.size:
            # A new epoch is shared out to those who are left.
            self._deal()

    def _healed(self, healing: Healing) -> None:
        """Ranks have failed, and others go on without having stopped."""
        world, link = self._world, self._world.link
        assert link is not None
        self._pace.lap()
        now, step = time.time(), self._state.step if self._begun else -1
        recovery = Recovered(healing, Transfer(0, (), step, step), now, now, 1)
        self._teller.recovered(recovery)
        if world.membership is not healing.after:
            # All have agreed on another since.
            return
        if self._apart:
            self.group.park(self.rank, self.size)
            if self._on_shrink == "scale-lr":
                before = len(healing.before.active)
                _scale_learning_rate(self._state, self.size / before)
            if self._checkpoints and world.logical == 0 and healing.before.logical(world.world):
                self._checkpoints.attach_alone(None, self._state, saves=True)
                self._checkpoints.take_over()
        link.send(
            "role",
            logical=world.logical,
            active=world.membership.active,
            epoch=world.membership.epoch,
        )
        self._repetition.look(recovery)

    def _failed_here_or_there(self) -> bool:
        assert self._world.active is not None
        return self._failed() or self._world.active.Is_revoked()

    def _save(self, state: State, overlap: bool) -> None:
        if self._dry or self._idle is not None:
            return
        if not self._checkpoints:
            raise HpcftError("state.save() has nowhere to save to", "start with --ckpt-dir DIR")
        if self._stepped or self._seeded_forward:
            raise HpcftError(
                "state.save() was called in the middle of a step", "call it right after commit()"
            )
        if self._failed():
            raise StepInterrupted
        self._checkpoints.save(state, overlap)

    # -- between failures ----------------------------------------------------------------------

    def _stretch(self, train: Callable[[State], None], state: State) -> Outcome:
        """Train, or wait as a spare, until all is over or somebody fails."""
        self._world.progress.run(not self.spare)
        self._leaving = self._resizing = False
        link = self._world.link
        self._apart = False
        try:
            if self.spare:
                assert link is not None
                link.departures.wait()
                over = self._wait_as_spare(train, state)
                if over is not None:
                    return Outcome.OVER if over else Outcome.AGREED
            elif self._world.membership.epoch == self._epoch:
                self._start(state)
            if self._free and not self._apart:
                self._part(self._free.open)
            self._world.progress.step(state.step)
            if link:
                link.departures.begin(self._world.membership.epoch)
            while not self._trained(train, state):
                pass
        except (StepInterrupted, _Replacing):
            return Outcome.BROKEN_OFF
        except MPI.Exception:
            return Outcome.BROKEN_OFF
        except HpcftError:
            if self._apart:
                self._last_words()
            raise
        except Exception:
            # What a script does with the results of a broken world says nothing about the script.
            if not self._failed():
                raise
            self._broken = self._broken or self._stepped > 0
            self._teller.say("hpcft: dropped, as a rank has failed: " + traceback.format_exc())
            return Outcome.BROKEN_OFF
        return Outcome.OVER if self._world.finish() else Outcome.AGREED

    def _wait_as_spare(self, train: Callable[[State], None], state: State) -> bool | None:
        """Wait as a spare; None if this process trains now, without the others having stopped."""
        if not self._free:
            return self._world.park(idle=lambda: self._try(train, state))
        over = self._world.park(self._free.wanted)
        if over is not None:
            return over
        if not self._free.join():
            return self._world.park()
        self._begun = self._whole = True
        self._world.progress.run(True)
        self._place(state)
        self._savepoint = Savepoint(state)
        if self._checkpoints:
            self._checkpoints.attach_alone(None, state, self.rank == 0)
            if self.rank == 0:
                self._checkpoints.take_over()
        self._teller.restored(state.step)
        self._part(_nothing)
        return None

    def _part(self, begin: Callable[[], None]) -> None:
        """From now on each rank trains by itself."""
        self.group.park(self.rank, self.size)
        self._apart = True
        begin()

    def _assemble(self, state: State) -> None:
        """All ranks have trained to the end: come together, and hold the average."""
        assert self._free is not None
        self._free.finish()
        self._apart = False
        assert self._world.active is not None
        self.group.attach(self._world.active)
        averaged = self._free.average(self.group)
        if not averaged or self._failed_here_or_there():
            raise StepInterrupted
        assert self._savepoint is not None
        self._savepoint.renew()
        if self._checkpoints:
            self._checkpoints.attach_alone(self._world.active, state, self.rank == 0)
            # One may have been asked to leave when another was at the end already.
            self._leaving = self._checkpoints.any_rank(self._leaving)

    def _trained(self, train: Callable[[State], None], state: State) -> bool:
        """Train up to the end, or to where all leave, and save what is to be saved.

        Returns
        -------
        False if training goes on: what the next launch was to go on from could not be saved.
        """
        try:
            while not self._in_time(train, state):
                self._catch_up(state)
        except _Leaving:
            self._leaving = True
        if self._backup:
            self._come_together(state)
        elif self._free:
            self._assemble(state)
        else:
            self._average()
        if not self._checkpoints:
            return True
        if self._leaving:
            link = self._world.link
            assert link is not None
            ends = self._checkpoints.any_rank(link.departures.end.asked)
            self._resizing = not ends
            resize = link.departures.resize
            if self._resizing and not self._checkpoints.hand_over(state, resize.durable):
                self._leaving = self._resizing = False
                resize.forget()
                link.send("stays")
                if self._backup:
                    assert self._world.active is not None
                    self._save_with(self._world.active, state)
                self._begin_step(state)
                if self._free:
                    self._part(self._free.again)
                return False
        if not self._resizing:
            self._checkpoints.finish(state)
        return True

    def _in_time(self, train: Callable[[State], None], state: State) -> bool:
        """Train; False if others have made a step without this rank."""
        try:
            train(state)
        except Late:
            return False
        return True

    def _catch_up(self, state: State) -> None:
        """Go on where the others are, who have made steps without this rank."""
        assert self._backup is not None
        assert self._savepoint is not None
        self._pace.late()
        self._savepoint.restore()
        if self._checkpoints:
            self._checkpoints.before_update()
        self._broken = True
        if not self._backup.catch_up():
            self._broken = False
            raise StepInterrupted
        self._savepoint.renew()
        self._world.progress.step(state.step)
        self._place(state)
        self._leave_if_asked(state)

    def _come_together(self, state: State) -> None:
        """Training is over: have all ranks at the same step again, and save together."""
        assert self._backup is not None
        if not self._backup.gather():
            raise StepInterrupted
        if self._checkpoints:
            assert self._world.active is not None
            self._checkpoints.settle()
            self._checkpoints.attach(self._world.active, state)

    def _attend(self) -> None:
        """A membership begins."""
        if self._backup:
            self._backup.attend(self._world.membership.epoch, self.size)

    def _start(self, state: State) -> None:
        """Have all ranks begin with the state of rank 0."""
        assert self._world.active is not None
        assert self._savepoint is not None
        comm = self._world.active
        self._teller.started()
        sharded = state.sharded()
        with self._world.progress.waiting():
            if self._checkpoints:
                self._checkpoints.restore(state, comm)
                # Should a rank fail before all have it, this is what rank 0 gives them.
                self._savepoint.renew()
            if self._on_shrink == "scale-lr":
                size = CommRanks(comm).share(
                    self._teller.saved_by(state.step) if comm.rank == 0 else None
                )
                _scale_learning_rate(state, self.size / size)
            if comm.size > 1 and not sharded:
                everybody = Transfer(0, tuple(range(1, comm.size)), 0, 0)
                if comm.rank == 0:
                    give(comm, everybody, state.take_apart())
                else:
                    arrival = Arrival(state, in_place=True)
                    arrival.receive(comm, everybody)
                    arrival.install()
        if self._checkpoints:
            self._checkpoints.check(state)
            self._save_with(comm, state)
        if self._balance:
            self._balance.begin(comm, state.step)
        self._teller.restored(state.step)
        self._attend()
        self._place(state)
        self._savepoint.renew()
        self._begun = True

    def _save_with(self, comm: MPI.Intracomm, state: State) -> None:
        """Save with these ranks from now on, or without them."""
        assert self._checkpoints is not None
        if self._free or self._backup:
            self._checkpoints.attach_alone(comm, state, comm.rank == 0)
        else:
            self._checkpoints.attach(comm, state)

    def _run_dry(self, train: Callable[[State], None], state: State, what: str) -> None:
        """Run the script's steps for nobody; ``what`` they are is said if they fail."""
        try:
            train(state)
        except _DryRunOver:
            pass
        except Exception:
            print(f"hpcft: {what} failed:", file=sys.stderr)
            traceback.print_exc()

    def _warm_up(self, train: Callable[[State], None], state: State) -> None:
        """Run a few steps for nobody, so that all that is made on first use is made."""
        self._dry = _MOST_DRY_STEPS
        self._run_dry(train, state, "the dry steps of a spare")
        self._dry = 0
        self._warmed = True

    def _try(self, train: Callable[[State], None], state: State) -> None:
        """Find out, if that is wanted, how long a step takes this spare, which was slow."""
        link = self._world.link
        assert link is not None
        if not link.probe.is_set():
            return
        link.probe.clear()
        if state.sharded():
            return
        self._trial, self._dry = [], _TRIAL_STEPS
        self._run_dry(train, state, "the dry steps of a spare")
        times, self._trial, self._dry = self._trial, None, 0
        if len(times) == _TRIAL_STEPS:
            link.send("probed", seconds=median(b - a for a, b in pairwise(times)))

    def _settle(self, train: Callable[[State], None], state: State) -> None:
        """Begin a step for nobody, as a failure came before this rank had completed a first one."""
        self.group.failure = self.group.failure or MPI.Exception(MPI.ERR_REVOKED)
        self._idle = set(state.optimizers())
        self._run_dry(train, state, "a dry step of a survivor")
        self._idle = None
        self._buckets.settle()

    # -- failures ------------------------------------------------------------------------------

    def _refuse(self) -> None:
        """Give up on a failure before :meth:`run`.

        What the script's collectives have given it so far may already differ between the ranks,
        and a spare, which parks with collectives of its own, has none of it.
        """
        if self._world.link is not None:
            raise ScriptInterrupted

    def leave(self) -> None:
        """The script has been unwound, to be run anew: come to the membership it is run anew with.

        Raises
        ------
        HpcftError: the run ends.
        """
        if self._free:
            self._free.close()
        if not self._left:
            # Hit before training: nothing of this process's is worth keeping.
            report = Report(self._world.world, 0, whole=True, broken=True, anew=True)
            self._heal(report, lambda comm, plan: None, agreed=False)
            self._left = True
        self._world.progress.run(False)
        if self._world.link:
            self._world.link.departures.pause()
        # Its traceback holds the frames it has come through, and these the model.
        self.group.failure = None

    def _recover(self, state: State, agreed: bool) -> None:
        world, link, former = self._world, self._world.link, self._world.logical
        assert link is not None
        # One that was to join, and has not, is parked as far as MPI is concerned.
        was_spare = self.spare or (world.active is None and not self._begun)
        self._apart = False
        if self._free and (was_spare or self._broken):
            self._free.reset()
        assert self._savepoint is not None
        sharded = state.sharded()
        if self._checkpoints:
            # What is looked for next, if the state is sharded, is the newest.
            (self._checkpoints.settle if sharded else self._checkpoints.drop)()
        if not was_spare and not self._broken:
            self._savepoint.restore()
        report = Report(
            world.world,
            -1 if was_spare else state.step,
            whole=self._whole,
            broken=self._broken or sharded or not self._begun,
            anew=sharded,
            slow=link.slow,
            steps_down=self._steps_down,
        )
        self._steps_down = False
        arrival = Arrival(state, in_place=was_spare)

        def transfer(comm: MPI.Intracomm, plan: Transfer) -> None:
            if plan.anew:
                return
            if plan.step < 0:
                self._restore(state, comm)
            if comm.rank == plan.source:
                give(comm, plan, state.take_apart())
            elif comm.rank in plan.receivers:
                arrival.receive(comm, plan)

        def settle(recovery: Recovered) -> None:
            if recovery.transfer.anew:
                return
            if world.logical is None:
                if not was_spare:
                    self._park(was_first=former == 0)
                return
            assert world.active is not None
            if world.logical in recovery.transfer.receivers:
                arrival.install()
            self.group.attach(world.active)
            if self._on_shrink == "scale-lr":
                _scale_learning_rate(state, self.size / len(recovery.healing.before.active))
            # What was restored has a step nobody could know when it was planned.
            recovery.transfer = replace(recovery.transfer, step=state.step)
            self._whole = self._begun = True
            self._attend()
            self._place(state)
            self._savepoint = Savepoint(state)
            if self._balance:
                self._balance.begin(world.active, state.step)
            if self._checkpoints:
                self._save_with(world.active, state)

        try:
            recovery = self._heal(report, transfer, agreed, settle)
        except StateLost as error:
            if sharded:
                raise _shard_lost() from error
            raise
        if recovery.transfer.anew:
            self._left = True
            # For what the script does while it is unwound.
            self.group.failure = self.group.failure or MPI.Exception(MPI.ERR_REVOKED)
            raise ScriptInterrupted

    def _park(self, was_first: bool) -> None:
        """Wait as a spare from now on, having trained."""
        self.group.park(self.size - 1, self.size)
        if self._checkpoints and was_first:
            self._checkpoints.hand_on()

    def _heal(
        self,
        report: Report,
        transfer: Callable[[MPI.Intracomm, Transfer], None],
        agreed: bool,
        settle: Callable[[Recovered], None] = lambda recovery: None,
    ) -> Recovered:
        """Come to a new world, and let everybody know.

        Parameters
        ----------
        report, transfer, agreed: as :meth:`hpcft.world.recovery.World.recover` takes them.
        settle: makes this process one of the new world.
        """
        world, link = self._world, self._world.link
        assert link is not None
        self.group.revoke()
        self._pace.lap()
        try:
            recovery = world.recover(report, transfer, agreed)
            if self._checkpoints and world.logical == 0:
                self._checkpoints.take_over()
            settle(recovery)
            link.send(
                "role",
                logical=world.logical,
                active=world.membership.active,
                epoch=world.membership.epoch,
            )
            if self._free:
                self._free.recovered(recovery.healing.before.epoch)
            if recovery.healing.dead or not self._free:
                self._teller.recovered(recovery)
            self._repetition.look(recovery)
        except HpcftError:
            self._last_words()
            raise
        return recovery

    def _last_words(self) -> None:
        """The run ends; what came before that is to be told."""
        self._teller.tell()
        if self._world.logical != 0:
            # The first to say so ends all, also rank 0 while it is telling.
            time.sleep(_LAST_WORDS)

    def _restore(self, state: State, comm: MPI.Intracomm) -> None:
        """Bring back from a checkpoint what no survivor has."""
        if not (self._checkpoints and self._checkpoints.restore(state, comm)):
            raise state_lost()

    # -- the end -------------------------------------------------------------------------------

    def _finish(self, state: State) -> None:
        link = self._world.link
        if link:
            link.departures.wait()
        self._world.progress.run(False)
        self._pace.close()
        if self._checkpoints and self._world.logical == 0:
            self._checkpoints.close()
        if link:
            link.send("agreed", handed_over=self._resizing)
        if self.spare:
            raise SystemExit(0)
        if self._resizing:
            self._teller.tell()
            self._teller.close()
            raise SystemExit(INTERRUPTED)
        if self._leaving:
            assert link is not None
            assert self._checkpoints is not None
            reason = link.departures.end.reason
            self._teller.interrupted(state.step, reason, self._checkpoints.newest)
            raise SystemExit(INTERRUPTED)
        # Of shards nobody has all bytes.
        wanted = self._options["digest"] and not state.sharded() and self._world.logical == 0
        self._teller.finished(state.step, state.digest() if wanted else None)


def _nothing() -> None:
    """What there is to do for who has begun."""


def _shard_lost() -> StateLost:
    return StateLost(
        "a rank has failed, and with it its shard of the training state, which no other holds",
        "start again; with --ckpt-dir the next run will have something to go on from",
    )


def _scale_learning_rate(state: State, factor: float) -> None:
    if factor == 1:
        return
    for part in state.parts.values():
        if isinstance(part, torch.optim.Optimizer):
            for settings in part.param_groups:
                settings["lr"] *= factor
                if "initial_lr" in settings:
                    settings["initial_lr"] *= factor
        elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
            part.base_lrs = [lr * factor for lr in part.base_lrs]
