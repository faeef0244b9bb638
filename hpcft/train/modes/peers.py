"""The other ranks, while each steps on its own (:mod:`hpcft.train.modes.asynchronous`).

At a step's end a rank scales what the step has changed, sends that to all others, and adds what
theirs have sent meanwhile. So all copies hold the same sum of updates but for those on their way.
What an optimizer keeps stays each rank's own.

The scale is the rank's share of the samples, 1/N: N steps, one of each rank, then move the
parameters as far as one step of all together would. Where the optimizer divides by the size of
gradients (Adam and its like) it is the square root of that: a rank's own gradients are N times
noisier, their steps in different directions, and N of them come to less than one of all together
(the square root scaling rule: Malladi et al., "On the SDEs and scaling rules for adaptive gradient
algorithms", NeurIPS 2022).

What comes in is added by the thread that trains, at the edge of a step, and not by that of the
connection in the midst of one: so a gradient belongs to one set of parameters, and checkpoints and
newcomers find them whole.

Each rank works out by itself who is left (hpcft.world.succession), and a spare that finds itself
among those who train joins over the mesh (hpcft.train.mesh).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt
import torch

from hpcft.train.flat import Flat
from hpcft.train.interruption import StepInterrupted
from hpcft.train.mesh import Mesh, Snapshot
from hpcft.train.state import Slot, State, dump, load
from hpcft.world.link import Link
from hpcft.world.membership import Healing
from hpcft.world.session import Session
from hpcft.world.succession import succeed

#: What optimizers keep that divide by the size of gradients: the names torch's own have for it.
_SIZES = frozenset({"exp_avg_sq", "exp_inf", "square_avg", "sum"})
#: Seconds between two looks at the world of who waits for others.
_LOOK = 0.01
#: Seconds in which one who has the state must be found.
_PATIENCE = 5.0
#: So many times training may go on after its end, without a recovery.
_ROUNDS = 1 << 20


class Peers:
    """What one rank has to do with them.

    Parameters
    ----------
    healed: called with every change of the membership, when it has been made.
    about_to_change: called before parameters change outside of an optimizer's step.
    """

    def __init__(
        self,
        session: Session,
        state: State,
        healed: Callable[[Healing], None],
        about_to_change: Callable[[], None],
    ) -> None:
        self._world = session.world
        self._state = state
        self._healed = healed
        self._about_to_change = about_to_change
        self._staleness = session.mode.staleness
        self._flat = Flat(p for module in state.modules() for p in module.parameters())
        #: The parameters as they were when the step under way began.
        self._base = self._flat.empty()
        assert session.listener is not None
        self._mesh = Mesh(
            self._world.world,
            session.listener,
            session.addresses,
            session.key,
            self._flat.size,
            self._base.numpy().dtype,
        )
        self._known = 0
        #: What the membership follows from, and the last epoch that :attr:`_healed` was called of.
        self._agreed = self._world.agreed
        self._told = self._agreed.epoch
        self._mark = 0
        self._arrived: tuple[Any, list[torch.Tensor], int] | None = None

    @property
    def _link(self) -> Link:
        assert self._world.link is not None
        return self._world.link

    # -- who is there --------------------------------------------------------------------------

    def look(self) -> None:
        """Follow what has become of the world.

        Raises
        ------
        TooFewRanks: fewer are left than the run may go on with.
        """
        failures = list(self._link.failures.values())
        if len(failures) > self._known:
            self._known = len(failures)
            self._follow()
            dead = {failure.rank for failure in failures}
            self._mesh.want(self._world.membership.active, dead)
        elif not self._mesh.complete:
            self._mesh.want(self._world.membership.active, ())

    def _follow(self, limit: int | None = None) -> None:
        """Take over the memberships that follow from the deaths that are known.

        Parameters
        ----------
        limit: the last epoch that they are told of; None for all, which are taken over then.
        """
        world = self._world
        failures = list(self._link.failures.values())
        healings = succeed(self._agreed, failures, world.hosts, world.policy)
        for healing in healings:
            epoch = healing.after.epoch
            if epoch > self._told and (limit is None or epoch <= limit):
                self._told = epoch
                if limit is None:
                    world.membership = healing.after
                self._healed(healing)
        if limit is None and healings:
            world.membership = healings[-1].after

    def recovered(self, before: int) -> None:
        """All have agreed on a membership: tell of what came before it, as far as it is not told.

        Parameters
        ----------
        before: the epoch that was healed.
        """
        self._follow(before)
        self._told = self._world.membership.epoch
        self._agreed = self._world.agreed

    def wanted(self) -> bool:
        """Whether this process, a spare, is to train."""
        self.look()
        return self._world.logical is not None

    def _attend(self) -> None:
        """Do for others what they wait for, and see whether they call.

        Raises
        ------
        StepInterrupted: somebody has called for a recovery of all.
        """
        self.look()
        if self._mesh.asked():
            self._mesh.give(self._snapshot)
        if self._world.called():
            raise StepInterrupted

    # -- training ------------------------------------------------------------------------------

    def open(self) -> None:
        """All have the state, and begin; waits until all are connected.

        Raises
        ------
        StepInterrupted: somebody has called for a recovery of all.
        """
        self._agreed = self._world.agreed
        self._mark = self._agreed.epoch * _ROUNDS
        self._mesh.restored()
        self._begin()
        self._mesh.want(self._world.membership.active, list(self._link.failures))
        with self._world.progress.waiting():
            while not self._mesh.complete:
                self._attend()
                self._mesh.wait(_LOOK)

    def again(self) -> None:
        """All were at the end, and train on."""
        self._mark += 1
        self._begin()

    def _begin(self) -> None:
        self._flat.read(self._base)
        self._mesh.begin(self._state.step, self._mark)

    def stepped(self, share: float) -> None:
        """A step is completed: send what it has changed, and add what others have sent.

        Parameters
        ----------
        share: this rank's, of the samples of all.

        Raises
        ------
        StepInterrupted: somebody has called for a recovery of all.
        """
        # A new one each time, for it is sent without another copy.
        scale = share**0.5 if self._adapts() else share
        update = self._flat.read(self._flat.empty()).sub_(self._base).mul_(scale)
        self._base.add_(update)
        self._mesh.publish(self._state.step, update.numpy())
        self._absorb(always=True)
        self._attend()

    def _adapts(self) -> bool:
        """Whether the optimizers divide by the size of gradients."""
        kept = (kept for optimizer in self._state.optimizers() for kept in optimizer.state.values())
        return any(not _SIZES.isdisjoint(names) for names in kept)

    def _absorb(self, always: bool = False) -> None:
        """Add what has come in."""
        arrived = self._mesh.take()
        if arrived is not None:
            self._base.add_(torch.from_numpy(arrived))
        if arrived is not None or always:
            self._flat.write(self._base)
            if self._flat.lossy:
                self._flat.read(self._base)

    def hold(self) -> None:
        """Wait if this rank is too far ahead to begin another step.

        Raises
        ------
        StepInterrupted: somebody has called for a recovery of all.
        """
        if self._may_go_on():
            return
        with self._world.progress.waiting():
            while not self._may_go_on():
                self._about_to_change()
                self._absorb()
                self._attend()
                self._mesh.wait(_LOOK)

    def _may_go_on(self) -> bool:
        slowest = self._mesh.slowest
        return slowest is None or self._state.step + 1 - slowest <= self._staleness

    def finish(self) -> None:
        """This rank has trained to the end: wait for the others, whose updates still come.

        Raises
        ------
        StepInterrupted: all are to agree on who is left.
        """
        self._mesh.finish(self._mark)
        with self._world.progress.waiting():
            while not self._mesh.all_done(self._mark):
                self._about_to_change()
                self._absorb()
                self._attend()
                self._mesh.wait(_LOOK)
        self._absorb()
        self._attend()
        if self._world.membership.epoch != self._world.agreed.epoch:
            raise StepInterrupted

    # -- joining -------------------------------------------------------------------------------

    def close(self) -> None:
        """The script is run anew, and makes another of these."""
        self._mesh.close()

    def reset(self) -> None:
        """This process has no state, and will get one."""
        self._mesh.join()

    def join(self) -> bool:
        """Get the state from one of those who train.

        Returns
        -------
        False if others call, or no longer want this one: then nothing has come of it.

        Raises
        ------
        StepInterrupted: nobody has the state.
        """
        self._mesh.join()
        self._mesh.want(self._world.membership.active, list(self._link.failures))
        since = time.monotonic()
        with self._world.progress.waiting():
            while not self._mesh.joined:
                self.look()
                if self._world.called() or self._world.logical is None:
                    self._mesh.join()
                    self._mesh.want((), ())
                    self._world.membership = self._world.agreed
                    self._known = 0
                    return False
                if self._mesh.complete and self._mesh.ask(self._rooms):
                    since = time.monotonic()
                if time.monotonic() - since > _PATIENCE or self._alone:
                    # Nobody else may be left; then all find out together.
                    raise StepInterrupted
                self._mesh.wait(_LOOK)
        assert self._arrived is not None
        skeleton, tensors, self._mark = self._arrived
        self._state.install(skeleton, tensors)
        self._arrived = None
        self._mesh.settle()
        self._begin()
        return True

    @property
    def _alone(self) -> bool:
        return self._world.membership.active == (self._world.world,)

    def _rooms(self, package: bytes) -> list[npt.NDArray[Any]]:
        skeleton, slots, mark = load(package)
        tensors = [torch.empty(slot.shape, dtype=slot.dtype) for slot in slots]
        self._arrived = skeleton, tensors, mark
        return [_bytes(tensor) for tensor in tensors]

    def _snapshot(self, included: Mapping[int, int]) -> Snapshot:
        """The state for one that joins.

        What an optimizer keeps is read while it is sent, and may be of several steps: those are
        averages, to which that does no harm. All else is copied.
        """
        contents = self._state.take_apart()
        kept = {
            leaf.data_ptr()
            for optimizer in self._state.optimizers()
            for held in optimizer.state.values()
            for leaf in held.values()
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
        }
        tensors = [
            tensor.detach() if tensor.data_ptr() in kept else tensor.detach().cpu().clone()
            for tensor in contents.tensors
        ]
        slots = [Slot.of(tensor) for tensor in tensors]
        package = dump((contents.skeleton, slots, self._mark))
        return Snapshot(package, [_bytes(tensor) for tensor in tensors], included)


def _bytes(tensor: torch.Tensor) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found
