"""What this process does when a rank has failed: come to the next membership, with the state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from mpi4py import MPI

from hpcft.errors import HpcftError, StateLost
from hpcft.train.dealing import Dealing
from hpcft.train.lasting import Lasting
from hpcft.train.modes.strategy import Strategy
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.train.transfer import Arrival, give
from hpcft.world.recovery import Recovered, Report, Transfer, state_lost
from hpcft.world.script import ScriptInterrupted

#: Seconds that rank 0 gets to write down how the run ended.
_LAST_WORDS = 1.0


class Healer:
    """Has this process come to a new membership.

    Parameters
    ----------
    group: of the script; None where there is no script.
    """

    def __init__(self, lasting: Lasting, group: WorldProcessGroup | None = None) -> None:
        self._world = lasting.session.world
        self._teller = lasting.teller
        self._pace = lasting.pace
        self._repetition = lasting.repetition
        self._checkpoints = lasting.checkpoints
        self._group = group

    def heal(
        self,
        report: Report,
        transfer: Callable[[MPI.Intracomm, Transfer], None],
        agreed: bool,
        settle: Callable[[Recovered], None] = lambda recovery: None,
        is_news: Callable[[Recovered], bool] = lambda recovery: True,
    ) -> Recovered:
        """Come to a new world, and let everybody know.

        Parameters
        ----------
        report, transfer, agreed: as :meth:`hpcft.world.recovery.World.recover` takes them.
        settle: makes this process one of the new world.
        is_news: whether there is something to tell of it.
        """
        world = self._world
        if self._group:
            self._group.revoke()
        self._pace.lap()
        try:
            recovery = world.recover(report, transfer, agreed)
            if self._checkpoints and world.logical == 0:
                self._checkpoints.take_over()
            settle(recovery)
            world.send_role()
            if is_news(recovery):
                self._teller.recovered(recovery)
            self._repetition.look(recovery)
        except HpcftError:
            self.last_words()
            raise
        return recovery

    def heal_untrained(self) -> None:
        """The same before training: nothing of this process's is worth keeping."""
        report = Report(self._world.world, 0, whole=True, broken=True, anew=True)
        self.heal(report, lambda comm, plan: None, agreed=False)

    def last_words(self) -> None:
        """The run ends; what came before that is to be told."""
        self._teller.tell()
        if self._world.logical != 0:
            # The first to say so ends all, also rank 0 while it is telling.
            time.sleep(_LAST_WORDS)


class Recovery:
    """One recovery of a process that trains, or is parked as a spare.

    Parameters
    ----------
    steps_down: it is to change places with a spare.
    take_part: called when it has the state, and is to train.
    """

    def __init__(
        self,
        lasting: Lasting,
        group: WorldProcessGroup,
        replica: Replica,
        strategy: Strategy,
        dealing: Dealing,
        steps_down: bool,
        take_part: Callable[[], None],
    ) -> None:
        self._world = lasting.session.world
        self._checkpoints = lasting.checkpoints
        self._group = group
        self._replica = replica
        self._strategy = strategy
        self._dealing = dealing
        self._take_part = take_part
        self._steps_down = steps_down
        self._sharded = replica.state.sharded()
        world = self._world
        # One that was to join, and has not, is parked as far as MPI is concerned.
        self._was_spare = world.logical is None or (world.active is None and not replica.begun)
        self._was_first = world.logical == 0
        self._arrival = Arrival(replica.state, in_place=self._was_spare)

    def run(self, healer: Healer, agreed: bool) -> None:
        """Come to the new membership, and be one of it.

        Parameters
        ----------
        agreed: that there is to be one is agreed on.

        Raises
        ------
        ScriptInterrupted: the script has to be run anew.
        """
        replica = self._replica
        self._strategy.interrupted(lost=self._was_spare or replica.broken)
        if self._checkpoints:
            # What is looked for next, if the state is sharded, is the newest.
            (self._checkpoints.settle if self._sharded else self._checkpoints.drop)()
        if not self._was_spare and not replica.broken:
            replica.restore()
        try:
            recovery = healer.heal(
                self._report(), self._transfer, agreed, self._settle, self._strategy.recovered
            )
        except StateLost as error:
            if self._sharded:
                raise _shard_lost() from error
            raise
        if recovery.transfer.anew:
            # For what the script does while it is unwound.
            self._group.failure = self._group.failure or MPI.Exception(MPI.ERR_REVOKED)
            raise ScriptInterrupted

    def _report(self) -> Report:
        world, replica = self._world, self._replica
        assert world.link is not None
        return Report(
            world.world,
            -1 if self._was_spare else replica.state.step,
            whole=replica.whole,
            broken=replica.broken or self._sharded or not replica.begun,
            anew=self._sharded,
            slow=world.link.slow,
            steps_down=self._steps_down,
            tight=world.link.tight,
        )

    def _transfer(self, comm: MPI.Intracomm, plan: Transfer) -> None:
        if plan.anew:
            return
        if plan.step < 0:
            self._restore(comm)
        if comm.rank == plan.source:
            give(comm, plan, self._replica.state.take_apart())
        elif comm.rank in plan.receivers:
            self._arrival.receive(comm, plan)

    def _restore(self, comm: MPI.Intracomm) -> None:
        """Bring back from a checkpoint what no survivor has."""
        if not (self._checkpoints and self._checkpoints.restore(self._replica.state, comm)):
            raise state_lost()

    def _settle(self, recovery: Recovered) -> None:
        world = self._world
        if recovery.transfer.anew:
            return
        if world.logical is None:
            if not self._was_spare:
                self._park()
            return
        assert world.active is not None
        if world.logical in recovery.transfer.receivers:
            self._arrival.install()
        self._group.attach(world.active)
        self._dealing.resized(len(recovery.healing.before.active))
        # What was restored has a step nobody could know when it was planned.
        recovery.transfer = replace(recovery.transfer, step=self._replica.state.step)
        self._take_part()

    def _park(self) -> None:
        """Wait as a spare from now on, having trained."""
        self._group.park(self._world.part, self._world.size)
        if self._checkpoints and self._was_first:
            self._checkpoints.hand_on()


def _shard_lost() -> StateLost:
    return StateLost(
        "a rank has failed, and with it its shard of the training state, which no other holds",
        "start again; with --ckpt-dir the next run will have something to go on from",
    )
