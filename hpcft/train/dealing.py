"""What a rank has of each batch, and what follows from how many ranks there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from mpi4py import MPI

from hpcft.errors import HpcftError
from hpcft.train.balance import Balance
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.shares import Weights
from hpcft.train.state import State
from hpcft.world.recovery import World

#: What changes when training goes on with fewer ranks, or more.
OnShrink = Literal["keep-lr", "scale-lr", "keep-global-batch"]


@dataclass(frozen=True)
class Share:
    """A rank's part in a step.

    own: samples of this rank; 1 if nobody knows how many there are.
    everybody: samples of all ranks; 1 each.
    """

    own: int
    everybody: int

    @property
    def part(self) -> float:
        """This rank's, of all."""
        return self.own / self.everybody


class Dealing:
    """Shares out the data to those that train.

    Parameters
    ----------
    launched: how many ranks trained at first.
    balanced: whether faster ranks are to have more.

    Raises
    ------
    HpcftError: the state does not say what the batches are, where that has to be known.

    Attributes
    ----------
    sampler: the one that gives the ranks their batches; None if that is not known.
    ranks: among how many the data is shared out.
    """

    def __init__(
        self, state: State, world: World, on_shrink: OnShrink, launched: int, balanced: bool
    ) -> None:
        self._state = state
        self._world = world
        self._on_shrink = on_shrink
        self._launched = launched
        parts = state.parts.values()
        self._samplers = [part for part in parts if isinstance(part, ElasticBatchSampler)]
        self.sampler = self._samplers[0] if len(self._samplers) == 1 else None
        if on_shrink == "keep-global-batch" and self.sampler is None:
            raise HpcftError(
                'on_shrink="keep-global-batch" needs to know the batches',
                "track exactly one hpcft.ElasticBatchSampler in the state",
            )
        self._balance = self._balancing() if balanced else None

    def _balancing(self) -> Balance:
        if self.sampler is None:
            raise HpcftError(
                "--balance needs to know the batches",
                "track exactly one hpcft.ElasticBatchSampler in the state",
            )
        if self._state.sharded():
            raise HpcftError(
                "--balance needs DistributedDataParallel, which averages by samples; sharded "
                "modules average by ranks",
                "leave it away",
            )
        return Balance(self.sampler)

    # -- steps ---------------------------------------------------------------------------------

    def deal(self) -> None:
        """Share out the data to those that train now."""
        for sampler in self._samplers:
            keep = self._on_shrink == "keep-global-batch"
            whole = sampler.batch_size * self._launched if keep else None
            sampler.place(self._world.part, self._world.size, whole)
        self.ranks = self._world.size

    def begin(self) -> Share:
        """This rank's part in the step that begins."""
        if self.sampler is None:
            # Who goes on without a rank that is lost corrects for that itself.
            self._share = Share(1, self.ranks)
        else:
            # Exact also where the ranks' batches differ in size.
            self._share = Share(self.sampler.local_count, self.sampler.global_count)
        return self._share

    def advance(self, taken: Sequence[int] | None) -> bool:
        """A step is completed.

        Parameters
        ----------
        taken: the ranks whose samples it has learnt from; None for all.

        Returns
        -------
        Whether that was the last step of an epoch.
        """
        epochs = [sampler.epoch for sampler in self._samplers]
        for sampler in self._samplers:
            sampler.advance(taken)
        return epochs != [sampler.epoch for sampler in self._samplers]

    # -- speed ---------------------------------------------------------------------------------

    def attend(self, comm: MPI.Intracomm) -> None:
        """These ranks train from now on."""
        if self._balance:
            self._balance.begin(comm, self._state.step)

    def rebalance(self, seconds: float) -> Weights | None:
        """A step is completed, in all ranks: see whether the batch is to be shared out anew.

        Parameters
        ----------
        seconds: what this rank has computed in it.

        Returns
        -------
        The weights, if it is.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        if self._balance is None:
            return None
        with self._world.progress.waiting():
            return self._balance.edge(self._state.step, self._share.own, seconds)

    # -- the learning rate ---------------------------------------------------------------------

    @property
    def scales(self) -> bool:
        """Whether the learning rate goes with the number of ranks."""
        return self._on_shrink == "scale-lr"

    def resized(self, before: int) -> None:
        """Training goes on from where so many ranks were."""
        factor = self._world.size / before
        if not self.scales or factor == 1:
            return
        for part in self._state.parts.values():
            if isinstance(part, torch.optim.Optimizer):
                for settings in part.param_groups:
                    settings["lr"] *= factor
                    if "initial_lr" in settings:
                        settings["initial_lr"] *= factor
            elif isinstance(part, torch.optim.lr_scheduler.LRScheduler):
                part.base_lrs = [lr * factor for lr in part.base_lrs]
