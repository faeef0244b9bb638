"""What a job leaves to its mode.

DDP reads the annotations of :func:`averaging_hook`, so they must not be strings.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from hpcft.train.checkpoints import Checkpoints
from hpcft.train.dealing import Share
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.train.works import completed
from hpcft.world.recovery import Recovered, World


class Strategy:
    """One rank's part in a mode; this does what is the same in most.

    What is called when in a step: :meth:`begin`, :meth:`average` for each bucket of gradients,
    :meth:`before_update`, the optimizers' steps, and at the commit :meth:`taken`, :meth:`stepped`,
    :meth:`completed`, :meth:`hold`. All may raise StepInterrupted or MPI.Exception if a rank has
    failed, and Late where that is said.

    Parameters
    ----------
    group: the ranks.
    replica: has the state; the DDP modules among its parts ask here for averages from now on.
    checkpoints: saves and restores, if that is wanted.
    """

    def __init__(
        self,
        group: WorldProcessGroup,
        world: World,
        replica: Replica,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.group = group
        self.world = world
        self.replica = replica
        self.checkpoints = checkpoints
        #: What forward passes change, and all ranks are to have alike.
        self.buffers: list[torch.Tensor] = []
        for module in replica.state.modules():
            if isinstance(module, DistributedDataParallel):
                # Weakly: DDP keeps it in C++, where the garbage collector does not see the cycle.
                module.register_comm_hook(weakref.proxy(self), averaging_hook)
                if module.broadcast_buffers:
                    # Its forward would give rank 0's buffers to all at the start of the next step,
                    # too late if rank 0 dies before.
                    module.broadcast_buffers = False
                    self.buffers += list(module.buffers())

    # -- a step --------------------------------------------------------------------------------

    def begin(self, share: Share, together: bool) -> None:
        """A step begins.

        Parameters
        ----------
        share: this rank's, of the samples.
        together: all ranks are to make it, for something is to be done that needs them all.
        """

    def average(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """Average one bucket of gradients, in place; here they stay a rank's own."""
        return completed(bucket.buffer())

    def before_update(self) -> None:
        """The gradients are there, and nothing has changed yet.

        Raises
        ------
        Late: others have made the step.
        """

    def taken(self) -> Sequence[int] | None:
        """Whose samples the step has learnt from; None for all ranks'.

        Raises
        ------
        Late: others have made the step.
        """
        return None

    def stepped(self, epoch_over: bool) -> None:
        """The state is that of the next step."""

    def completed(self) -> None:
        """And no failure is known."""

    def hold(self) -> None:
        """All is done that belongs to the step's end; return when another may begin."""

    def catch_up(self) -> None:
        """This rank was late: go on where the others are."""
        raise NotImplementedError

    # -- from one membership to the next -------------------------------------------------------

    def park(self, idle: Callable[[], None]) -> bool | None:
        """Wait as a spare, as :meth:`hpcft.world.recovery.World.park` does.

        Returns
        -------
        True if training is over; False if all recover. None if this process has got the state
        meanwhile and trains now, without the others having stopped.
        """
        return self.world.park(idle=idle)

    def attend(self) -> None:
        """All ranks of a new membership are at the same step."""

    def save_with(self) -> None:
        """Save checkpoints with those that train now."""
        if self.checkpoints:
            assert self.world.active is not None
            self.checkpoints.attach(self.world.active, self.replica.state)

    def open(self) -> None:
        """This rank trains from here on."""

    def interrupted(self, lost: bool) -> None:
        """A recovery of all begins.

        Parameters
        ----------
        lost: this process has no state, and will get one.
        """

    def recovered(self, recovery: Recovered) -> bool:
        """All have agreed on a membership; returns whether that is news."""
        return True

    # -- the end -------------------------------------------------------------------------------

    def gather(self, leaving: bool) -> bool:
        """This rank has trained to the end: have all at the same step, with the same state.

        Parameters
        ----------
        leaving: it leaves before that, as the run was asked to end.

        Returns
        -------
        Whether all leave.
        """
        return leaving

    def again(self) -> None:
        """All were at the end, and train on."""

    def close(self) -> None:
        """The script is run anew, and makes another of these."""


def averaging_hook(strategy: Strategy, bucket: GradBucket) -> Future[torch.Tensor]:
    """Average one bucket of gradients.

    DDP's own way divides by the number of ranks there were when the module was wrapped.
    """
    return strategy.average(bucket)
