"""The edges of a step.

A step is a transaction. A failure surfaces only at its two edges: before the first
``optimizer.step()``, when nothing tracked has changed yet, and at the end of ``state.commit()``,
when all has. In between the collectives of a broken world do nothing, so that the script comes to
the next edge by itself.
"""

from __future__ import annotations

import torch

from hpcft.errors import HpcftError
from hpcft.train.buckets import Buckets
from hpcft.train.dealing import Dealing
from hpcft.train.departing import Departing
from hpcft.train.dry import DrySteps
from hpcft.train.health import Health
from hpcft.train.interruption import StepInterrupted
from hpcft.train.lasting import Lasting
from hpcft.train.modes.strategy import Strategy
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.train.seeds import Seeds


class Edges:
    """Has the state's modules, optimizers and methods lead here.

    Parameters
    ----------
    buckets: settled with the first step that is completed.
    """

    def __init__(
        self,
        lasting: Lasting,
        group: WorldProcessGroup,
        replica: Replica,
        strategy: Strategy,
        dealing: Dealing,
        seeds: Seeds,
        health: Health,
        departing: Departing,
        dry: DrySteps,
        buckets: Buckets,
    ) -> None:
        self._world = lasting.session.world
        self._checkpoints = lasting.checkpoints
        self._pace = lasting.pace
        self._teller = lasting.teller
        self._group = group
        self._replica = replica
        self._strategy = strategy
        self._dealing = dealing
        self._seeds = seeds
        self._health = health
        self._departing = departing
        self._dry = dry
        self._buckets = buckets
        #: How many optimizers have made their step.
        self._stepped = 0
        state = replica.state
        for module in state.modules():
            module.register_forward_pre_hook(self._before_forward)
        for optimizer in state.optimizers():
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
        state.__dict__["_commit"] = self._commit
        state.__dict__["_save"] = self._save

    def place(self) -> None:
        """Begin the step that the state is at, as the rank that this process is now."""
        self._dealing.deal()
        self.begin()

    def begin(self) -> None:
        """Begin the step that the state is at."""
        self._stepped = 0
        self._replica.broken = False
        spare = self._world.logical is None
        self._strategy.begin(self._dealing.begin(), spare or not self._buckets.settled)
        self._seeds.begin(self._world.part, self._replica.state.step)
        self._pace.begin()

    def dropped(self) -> None:
        """The step has been left somewhere between its edges."""
        self._replica.broken = self._replica.broken or self._stepped > 0

    def _before_forward(self, *_: object) -> None:
        self._dry.before_forward()
        self._seeds.forward()

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._dry.running:
            self._dry.before_step(optimizer)
            return
        if self._stepped == 0:
            self._strategy.before_update()
        if not self._health.failed():
            if self._checkpoints:
                self._checkpoints.before_update()
            return
        if self._stepped == 0:
            raise StepInterrupted
        # Another optimizer has stepped already, and this one steps on gradients nobody added up.
        self._replica.broken = True

    def _after_step(self, *_: object) -> None:
        self._stepped += 1

    def _commit(self, metrics: dict[str, float]) -> None:
        if self._dry.running:
            self._dry.committed()
            return
        state, replica = self._replica.state, self._replica
        taken = self._strategy.taken()
        state.__dict__["step"] += 1
        epoch_over = self._dealing.advance(taken)
        # A collective that failed after the optimizer's step has given its caller a wrong answer;
        # one that failed in a step without any optimizer's step, wrong gradients to who knows what.
        replica.whole = self._group.failure is None
        replica.broken = replica.broken or (not replica.whole and self._stepped == 0)
        self._strategy.stepped(epoch_over)
        replica.renew()
        self._world.progress.step(state.step)
        self._pace.committed(state.step, metrics)
        self._teller.stepped(state.step, self._world.size, metrics)
        if not self._buckets.settled:
            self._buckets.settle()
        if self._health.failed():
            raise StepInterrupted
        self._strategy.completed()
        if self._checkpoints:
            self._checkpoints.edge(state, metrics)
        self._departing.look()
        self._strategy.hold()
        if weights := self._dealing.rebalance(self._pace.computed):
            self._teller.shared_out(state.step, weights)
        self._pace.ended()
        self.begin()

    def _save(self, overlap: bool) -> None:
        if self._dry.running:
            return
        if not self._checkpoints:
            raise HpcftError("state.save() has nowhere to save to", "start with --ckpt-dir DIR")
        if self._stepped or self._seeds.used:
            raise HpcftError(
                "state.save() was called in the middle of a step", "call it right after commit()"
            )
        if self._health.failed():
            raise StepInterrupted
        self._checkpoints.save(self._replica.state, overlap)
