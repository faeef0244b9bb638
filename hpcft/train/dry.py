"""Steps for nobody: a process's own, without the others, that change nothing they have.

Spares come to know their script by them, or how fast they are; and a rank that a failure has hit in
its first step brings DDP's buckets into the order that the others have them in.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch
from mpi4py import MPI

from hpcft.train.buckets import Buckets
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.state import State
from hpcft.world.recovery import World

#: Steps a spare tries out, and how many it tries to come to a step of every module.
_STEPS = 2
_MOST_STEPS = 16

#: Steps by which a spare tries how fast it is; the time of the first is not taken.
_TRIAL_STEPS = 10


class _Over(BaseException):
    """The dry steps are done."""


class DrySteps:
    """Runs them, and is asked at the edges of each.

    Parameters
    ----------
    group: parked, so that collectives change nothing.
    buckets: settled on the way.

    Attributes
    ----------
    warm: whether this process has made steps, dry ones or others.
    """

    def __init__(
        self,
        train: Callable[[State], None],
        state: State,
        world: World,
        group: WorldProcessGroup,
        buckets: Buckets,
    ) -> None:
        self._train = train
        self._state = state
        self._world = world
        self._group = group
        self._buckets = buckets
        self.warm = world.logical is not None
        #: How many are still to be made.
        self._left = 0
        #: When those of a trial were done; None if there is no trial.
        self._trial: list[float] | None = None
        #: In a rank that settles its buckets: optimizers that have yet to come to their step.
        self._awaited: set[torch.optim.Optimizer] | None = None

    # -- what is tried -------------------------------------------------------------------------

    def warm_up(self) -> None:
        """In a spare: run a few steps, so that all that is made on first use is made."""
        self._left = _MOST_STEPS
        self._run("the dry steps of a spare")
        self._left = 0
        self.warm = True

    def probe(self) -> None:
        """In a spare that was slow: find out, if that is wanted, how long a step takes it now."""
        link = self._world.link
        assert link is not None
        if not link.probe.is_set():
            return
        link.probe.clear()
        if self._state.sharded():
            return
        self._trial, self._left = [], _TRIAL_STEPS
        self._run("the dry steps of a spare")
        times, self._trial, self._left = self._trial, None, 0
        if len(times) == _TRIAL_STEPS:
            link.send("probed", seconds=median(b - a for a, b in pairwise(times)))

    def settle(self) -> None:
        """In a rank that trains: begin a step, as a failure came before the first was completed."""
        self._group.failure = self._group.failure or MPI.Exception(MPI.ERR_REVOKED)
        self._awaited = set(self._state.optimizers())
        self._run("a dry step of a survivor")
        self._awaited = None
        self._buckets.settle()

    def _run(self, what: str) -> None:
        """Run the script's steps; ``what`` they are is said if they fail."""
        try:
            self._train(self._state)
        except _Over:
            pass
        except Exception:
            print(f"hpcft: {what} failed:", file=sys.stderr)
            traceback.print_exc()

    # -- the edges of a step -------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether the step that is under way is one."""
        return self._left > 0 or self._awaited is not None

    def before_forward(self) -> None:
        """A forward pass is about to begin."""
        if self._trial is not None and self._needed():
            raise _Over

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        if self._awaited is None:
            return
        self._awaited.discard(optimizer)
        if not self._awaited:
            raise _Over
        # Without gradients it changes nothing.
        optimizer.zero_grad(set_to_none=True)

    def committed(self) -> None:
        """The step is done."""
        if self._awaited is not None:
            raise _Over
        self._buckets.settle()
        self._left -= 1
        if self._trial is not None:
            self._trial.append(time.monotonic())
            if self._left and not self._needed():
                return
            raise _Over
        enough = self._left <= _MOST_STEPS - _STEPS and self._buckets.settled
        if enough or not self._left:
            raise _Over

    def _needed(self) -> bool:
        """Whether the others may want something of this spare."""
        return self._world.broken() or self._world.called()
