"""Local SGD: each rank steps on its own gradients, and now and then all average what they have.

S. U. Stich, "Local SGD converges fast and communicates little" (ICLR 2019); the same as the
federated averaging of McMahan et al. (AISTATS 2017) where all take part. With ``elastic`` below 1 a
rank moves only a part of the way towards the average, after elastic averaging (Zhang, Choromanska,
LeCun, "Deep learning with elastic averaging SGD", NeurIPS 2015), but without its centre variable:
the average of all ranks is the centre.

What an optimizer keeps (moments) stays each rank's own. Moments are averages over a rank's own
gradients of the last steps; they follow soon where its parameters are moved, and to average them,
too, would triple what Adam has to send.

Steps are counted together: all ranks are between the same two averagings, up to ``every`` steps
apart. A failure therefore is healed as when all step together.
"""

from __future__ import annotations

from mpi4py import MPI

from hpcft.train.checkpoints import Checkpoints
from hpcft.train.dealing import Share
from hpcft.train.flat import Flat
from hpcft.train.health import Health
from hpcft.train.modes.strategy import Strategy
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.train.state import State
from hpcft.world.mode import Mode
from hpcft.world.recovery import World


class Averaging:
    """Averages what the ranks have trained.

    Parameters
    ----------
    group: the ranks.
    every: steps from one averaging to the next.
    elastic: which part of the way to the average a rank moves, above 0, up to 1.
    """

    def __init__(self, group: WorldProcessGroup, every: int, elastic: float, state: State) -> None:
        self._group = group
        self._every = every
        self._elastic = elastic
        self._state = state
        # Running means are averaged as well: at the next step they belong to other parameters.
        parameters = [p for module in state.modules() for p in module.parameters()]
        self._flat = Flat([*parameters, *state.buffers()])
        self._averaged = -1
        self.begin()

    def begin(self) -> None:
        """The ranks are others, or begin anew: what they have trained on counts from now."""
        self._own = self._all = 0

    def stepped(self, own: int, everybody: int) -> None:
        """A step is done.

        Parameters
        ----------
        own, everybody: samples of this rank and of all in it.
        """
        self._own += own
        self._all += everybody
        if self._state.step % self._every == 0:
            self._average(self._elastic)

    def average(self) -> None:
        """Have all ranks hold the average, and nothing else; collective, at a step's edge."""
        if self._averaged != self._state.step:
            self._average(1.0)
            self._averaged = self._state.step

    def _average(self, part: float) -> None:
        share = self._own / self._all if self._all else 1 / self._group.size()
        average = self._flat.read(self._flat.empty()).mul_(share)
        self._group.allreduce([average])
        if self._group.failure is not None:
            # What a broken collective leaves is no average. Here it has changed nothing.
            return
        if part < 1:
            own = self._flat.read(self._flat.empty())
            average = own.lerp_(average, part)
        self._flat.write(average)
        self._averaged = self._state.step if part == 1 else -1
        self.begin()


class LocalSgd(Strategy):
    """One rank's part in it."""

    def __init__(
        self,
        group: WorldProcessGroup,
        world: World,
        replica: Replica,
        checkpoints: Checkpoints | None,
        mode: Mode,
        health: Health,
    ) -> None:
        super().__init__(group, world, replica, checkpoints)
        self._health = health
        self._averaging = Averaging(group, mode.sync_every, mode.elastic, replica.state)
        if checkpoints:
            checkpoints.beginning = self._average

    def attend(self) -> None:
        self._averaging.begin()

    def begin(self, share: Share, together: bool) -> None:
        self._share = share

    def stepped(self, epoch_over: bool) -> None:
        self._averaging.stepped(self._share.own, self._share.everybody)

    def gather(self, leaving: bool) -> bool:
        self._average()
        return leaving

    def _average(self) -> None:
        """Have all ranks hold the same, for what is saved is to be the average."""
        with self.world.progress.waiting():
            self._averaging.average()
        if self._health.failed_anywhere():
            raise MPI.Exception(MPI.ERR_REVOKED)
        self.replica.renew()
