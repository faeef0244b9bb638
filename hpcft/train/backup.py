"""Steps made of the gradients that come first: backup workers (:mod:`hpcft.world.cohort`).

Until the last bucket of gradients is there a step's gradients stay where they are; then the cohort
is settled, and its ranks add theirs up among themselves. Nobody else is waited for.

The ranks are at different steps, if one is late, and so nothing can be done that needs all of them:
the script's own collectives are refused, and rank 0 saves checkpoints alone.

DDP reads the hook's annotations, so they must not be strings.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from mpi4py import MPI
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpcft.errors import HpcftError
from hpcft.train.averaging import averaging_hook
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.state import State
from hpcft.train.transfer import Arrival, give
from hpcft.world.cohort import Cohort, Cohorts
from hpcft.world.recovery import Transfer, World


class Late(BaseException):
    """This rank's gradients came too late for the step.

    Not an Exception, so that a training loop's ``except Exception`` lets it pass.
    """


class Backup:
    """One rank's part in such steps.

    Parameters
    ----------
    group: the ranks.
    cohorts: settles who makes a step.
    failed: whether a rank has failed; then what waits for others waits no longer.

    Attributes
    ----------
    scale: what this rank's gradients are multiplied with where all ranks make a step, see
        :class:`hpcft.train.averaging.Averaging`.
    cohort: of the step that is under way, once it is settled.
    """

    def __init__(
        self, group: WorldProcessGroup, world: World, cohorts: Cohorts, failed: Callable[[], bool]
    ) -> None:
        self.group = group
        self.own_gradients = False
        self._world = world
        self._cohorts = cohorts
        self._failed = failed
        self.scale = 1.0
        self.cohort: Cohort | None = None
        self._step = 0
        self._apart = False
        self._waiting: list[tuple[torch.Tensor, Future[torch.Tensor]]] = []

    def bind(
        self,
        state: State,
        sampler: ElasticBatchSampler | None,
        before_the_step: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Train this state.

        Parameters
        ----------
        sampler: gives the ranks their batches; None: they are of one size.
        before_the_step: within it the state is as the step that is under way began with it.

        Raises
        ------
        HpcftError: they cannot be trained so.
        """
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
        self._state, self._sampler = state, sampler
        self._before_the_step = before_the_step

    def attend(self, epoch: int, size: int) -> None:
        """A membership begins, of so many ranks that train, which are at the same step."""
        self._cohorts.begin(epoch, size)

    def begin(self, step: int, scale: float, together: bool) -> None:
        """A step begins.

        Parameters
        ----------
        step: the number of steps completed.
        together: all ranks are to make it, for something is to be done that needs them all.
        """
        self._step, self.scale = step, scale
        self.cohort = None
        self._waiting.clear()
        self._apart = not together
        self.group.apart = _APART if self._apart else None

    def late(self) -> bool:
        """Whether the step was made by others."""
        return self.cohort is not None and self._world.logical not in self.cohort.ranks

    def taken(self) -> Sequence[int] | None:
        """Whose gradients have made the step; None for all ranks'."""
        return self.cohort.ranks if self.cohort else None

    # -- gradients -----------------------------------------------------------------------------

    def average(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """Average one bucket of gradients over the cohort, in place, once all buckets are there."""
        if not self._apart:
            return averaging_hook(self, bucket)
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
        if self.cohort is None:
            self.cohort = self._settled()
        if self.cohort is None or self.late():
            return
        scale = self._share(self.cohort.ranks)
        for gradient in gradients:
            gradient.mul_(scale)
        self.group.allreduce_among(self.cohort.ranks, gradients)

    def _settled(self) -> Cohort | None:
        """Who makes the step; None if that is not settled any more, as a rank has failed."""
        rank = self._world.logical
        assert rank is not None
        with self._world.progress.waiting():
            cohort = self._cohorts.ready(rank, self._step, self._failed)
            while cohort and not cohort.ranks:
                try:
                    with self._before_the_step():
                        self._give(cohort)
                except MPI.Exception as error:
                    self.group.failure = error
                    return None
                cohort = self._cohorts.made(rank, self._step, self._failed)
        return cohort

    def _share(self, ranks: Sequence[int]) -> float:
        """This rank's part of the samples that the step learns from."""
        if self._sampler is None:
            return 1 / len(ranks)
        return self._sampler.local_count / self._sampler.count_of(ranks)

    def share_buffers(self, flat: torch.Tensor) -> bool:
        """Give the cohort its first rank's buffers; False if all ranks are to have rank 0's."""
        if not self._apart:
            return False
        if self.cohort:
            self.group.broadcast_among(self.cohort.ranks, [flat])
        return True

    # -- late ranks ----------------------------------------------------------------------------

    def hand_on(self) -> None:
        """A step is completed: give the state to who was late, if that is this rank's turn.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        if self.cohort and self.cohort.joining and self.cohort.giver == self._world.logical:
            self._give(self.cohort)

    def _give(self, cohort: Cohort) -> None:
        assert self._world.active is not None
        with self._world.progress.waiting():
            give(self._world.active, _transfer(cohort), self._state.take_apart())

    def catch_up(self) -> bool:
        """This rank was late: take over the state of one that was not.

        Returns
        -------
        False if that could not be, as a rank has failed; the state is as it was then.

        Raises
        ------
        MPI.Exception: a rank has failed meanwhile, and what this rank holds is no state at all.
        """
        rank = self._world.logical
        assert rank is not None
        assert self._world.active is not None
        with self._world.progress.waiting():
            cohort = self._cohorts.taken_in(rank, self._failed)
            if cohort is None:
                return False
            arrival = Arrival(self._state, in_place=True)
            arrival.receive(self._world.active, _transfer(cohort))
            arrival.install()
        return True

    def gather(self) -> bool:
        """All steps are done here: wait until they are in all ranks, which are together again.

        Returns
        -------
        False if a rank has failed.

        Raises
        ------
        MPI.Exception: the same.
        """
        rank = self._world.logical
        assert rank is not None
        self._cohorts.completed(rank, self._state.step)
        while True:
            with self._world.progress.waiting():
                cohort = self._cohorts.concluded(rank, self._failed)
            if cohort is None:
                return False
            if cohort.over:
                break
            self._give(cohort)
        self.begin(self._state.step, self.scale, together=True)
        return True


def backup_hook(backup: Backup, bucket: GradBucket) -> Future[torch.Tensor]:
    """Average one bucket of gradients."""
    return backup.average(bucket)


def _transfer(cohort: Cohort) -> Transfer:
    completed = cohort.step + 1
    return Transfer(cohort.giver, cohort.joining, completed, completed)


_APART = HpcftError(
    "the script calls a collective of torch.distributed, and with --mode backup the ranks are not "
    "at the same step",
    "leave it away in the training loop, where each rank's own figures have to do, or use "
    "--mode sync",
)
