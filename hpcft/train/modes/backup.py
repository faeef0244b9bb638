"""Steps made of the gradients that come first: backup workers (:mod:`hpcft.world.cohort`).

Until the last bucket of gradients is there a step's gradients stay where they are; then the cohort
is settled, and its ranks add theirs up among themselves. Nobody else is waited for.

The ranks are at different steps, if one is late, and so nothing can be done that needs all of them:
the script's own collectives are refused, and rank 0 saves checkpoints alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpcft.errors import HpcftError
from hpcft.train.checkpoints import Checkpoints
from hpcft.train.dealing import Share
from hpcft.train.health import Health
from hpcft.train.interruption import Late, StepInterrupted
from hpcft.train.modes.sync import Sync
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.state import State
from hpcft.train.transfer import Arrival, give
from hpcft.world.cohort import Cohort
from hpcft.world.recovery import Transfer, World


class Backup(Sync):
    """One rank's part in such steps.

    Parameters
    ----------
    health: tells when what waits for others need wait no longer.
    sampler: gives the ranks their batches; None: they are of one size.

    Raises
    ------
    HpcftError: the state cannot be trained so.
    """

    def __init__(
        self,
        group: WorldProcessGroup,
        world: World,
        replica: Replica,
        checkpoints: Checkpoints | None,
        health: Health,
        sampler: ElasticBatchSampler | None,
    ) -> None:
        super().__init__(group, world, replica, checkpoints)
        _check(replica.state)
        assert world.link is not None
        self._cohorts = world.link.cohorts
        self._health = health
        self._sampler = sampler
        #: Of the step that is under way, once it is settled.
        self._cohort: Cohort | None = None
        self._apart = False
        self._waiting: list[tuple[torch.Tensor, Future[torch.Tensor]]] = []

    def attend(self) -> None:
        self._cohorts.begin(self.world.membership.epoch, self.world.size)

    def begin(self, share: Share, together: bool) -> None:
        super().begin(share, together)
        self._come(together)

    def _come(self, together: bool) -> None:
        """All ranks, or those whose gradients come first, do what is next."""
        self._step = self.replica.state.step
        self._cohort = None
        self._waiting.clear()
        self._apart = not together
        self.group.apart = _APART if self._apart else None

    @property
    def _rank(self) -> int:
        assert self.world.logical is not None
        return self.world.logical

    @property
    def _late(self) -> bool:
        """Whether the step was made by others."""
        return self._cohort is not None and self.world.logical not in self._cohort.ranks

    def taken(self) -> Sequence[int] | None:
        if self._late:
            raise StepInterrupted if self._health.failed() else Late
        return self._cohort.ranks if self._cohort else None

    # -- gradients and buffers -----------------------------------------------------------------

    def average(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """Average one bucket of gradients over the cohort, in place, once all buckets are there."""
        if not self._apart:
            return super().average(bucket)
        gradients = bucket.buffer()
        elsewhere = gradients.device.type != "cpu"
        future: Future[torch.Tensor] = Future(devices=[gradients.device] if elsewhere else None)
        self._waiting.append((gradients, future))
        if bucket.is_last():
            waiting, self._waiting = self._waiting, []
            self._add_up([summand for summand, _ in waiting])
            for averaged, promise in waiting:
                promise.set_result(averaged)
        return future

    def _add_up(self, gradients: list[torch.Tensor]) -> None:
        if self._cohort is None:
            self._cohort = self._settled()
        if self._cohort is None or self._late:
            return
        scale = self._part_among(self._cohort.ranks)
        for gradient in gradients:
            gradient.mul_(scale)
        self.group.allreduce_among(self._cohort.ranks, gradients)

    def _settled(self) -> Cohort | None:
        """Who makes the step; None if that is not settled any more, as a rank has failed."""
        failed = self._health.failed_anywhere
        with self.world.progress.waiting():
            cohort = self._cohorts.ready(self._rank, self._step, failed)
            while cohort and not cohort.ranks:
                try:
                    with self.replica.brought_back():
                        self._give(cohort)
                except MPI.Exception as error:
                    self.group.failure = error
                    return None
                cohort = self._cohorts.made(self._rank, self._step, failed)
        return cohort

    def _part_among(self, ranks: Sequence[int]) -> float:
        """This rank's part of the samples that the step learns from."""
        if self._sampler is None:
            return 1 / len(ranks)
        return self._sampler.local_count / self._sampler.count_of(ranks)

    def before_update(self) -> None:
        self.taken()
        if not self._apart:
            super().before_update()
        elif self.buffers:
            self._share_buffers(self._give_buffers)

    def _give_buffers(self, flat: torch.Tensor) -> None:
        """Give the cohort its first rank's buffers."""
        if self._cohort:
            self.group.broadcast_among(self._cohort.ranks, [flat])

    # -- late ranks ----------------------------------------------------------------------------

    def completed(self) -> None:
        """Give the state to who was late, if that is this rank's turn."""
        if self._cohort and self._cohort.joining and self._cohort.giver == self.world.logical:
            self._give(self._cohort)

    def _give(self, cohort: Cohort) -> None:
        assert self.world.active is not None
        with self.world.progress.waiting():
            give(self.world.active, _transfer(cohort), self.replica.state.take_apart())

    def catch_up(self) -> None:
        replica = self.replica
        replica.restore()
        if self.checkpoints:
            self.checkpoints.before_update()
        # Until another's state has come in as a whole this one is none.
        replica.broken = True
        if not self._take_over():
            replica.broken = False
            raise StepInterrupted
        replica.renew()

    def _take_over(self) -> bool:
        """Take over the state of a rank that was not late.

        Returns
        -------
        False if that could not be, as a rank has failed; the state is as it was then.

        Raises
        ------
        MPI.Exception: a rank has failed meanwhile, and what this rank holds is no state at all.
        """
        assert self.world.active is not None
        with self.world.progress.waiting():
            cohort = self._cohorts.taken_in(self._rank, self._health.failed_anywhere)
            if cohort is None:
                return False
            arrival = Arrival(self.replica.state, in_place=True)
            arrival.receive(self.world.active, _transfer(cohort))
            arrival.install()
        return True

    # -- saving, and the end -------------------------------------------------------------------

    def save_with(self) -> None:
        if self.checkpoints:
            comm = self.world.active
            assert comm is not None
            self.checkpoints.attach_alone(comm, self.replica.state, comm.rank == 0)

    def gather(self, leaving: bool) -> bool:
        self._cohorts.completed(self._rank, self.replica.state.step)
        while True:
            with self.world.progress.waiting():
                cohort = self._cohorts.concluded(self._rank, self._health.failed_anywhere)
            if cohort is None:
                raise StepInterrupted
            if cohort.over:
                break
            self._give(cohort)
        self._come(together=True)
        if self.checkpoints:
            self.checkpoints.settle()
            super().save_with()
        return leaving

    def again(self) -> None:
        self.save_with()


def _check(state: State) -> None:
    wrapped = [m for m in state.modules() if isinstance(m, DistributedDataParallel)]
    if not wrapped or state.sharded():
        raise HpcftError(
            "--mode backup needs a model that every rank has as a whole, wrapped by "
            "DistributedDataParallel",
            "wrap it so, or use --mode sync",
        )
    if any(module.find_unused_parameters for module in wrapped):
        raise HpcftError(
            "--mode backup cannot train with find_unused_parameters=True, for which DDP has "
            "all ranks wait for each other",
            "leave that away, if all parameters get gradients, or use --mode sync",
        )


def _transfer(cohort: Cohort) -> Transfer:
    completed = cohort.step + 1
    return Transfer(cohort.giver, cohort.joining, completed, completed)


_APART = HpcftError(
    "the script calls a collective of torch.distributed, and with --mode backup the ranks are not "
    "at the same step",
    "leave it away in the training loop, where each rank's own figures have to do, or use "
    "--mode sync",
)
