"""Asynchronous training: each rank steps on its own, and sends what that changes to all others.

Without a server, each with a copy of its own, after Hogwild (Niu, Recht, Ré, Wright, NeurIPS 2011)
and its distributed relatives (Dean et al., "Large scale distributed deep networks", NeurIPS 2012),
with a bound on how far ranks may be apart (Ho et al., "More effective distributed ML via a stale
synchronous parallel parameter server", NeurIPS 2013).

Nobody stops for a failure. MPI is used when all begin, and again when all have come to the end:
only then they agree on who is left. In between they are *apart*: each works out by itself who is
left, and a spare that finds itself among those who train joins (:mod:`hpcft.train.modes.peers`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hpcft.train.dealing import Dealing, Share
from hpcft.train.flat import Flat
from hpcft.train.health import Health
from hpcft.train.interruption import StepInterrupted
from hpcft.train.lasting import Lasting
from hpcft.train.modes.peers import Peers
from hpcft.train.modes.strategy import Strategy
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.world.membership import Healing
from hpcft.world.recovery import Recovered, Transfer


class Asynchronous(Strategy):
    """One rank's part in it."""

    def __init__(
        self,
        group: WorldProcessGroup,
        replica: Replica,
        lasting: Lasting,
        health: Health,
        dealing: Dealing,
    ) -> None:
        super().__init__(group, lasting.session.world, replica, lasting.checkpoints)
        self._health = health
        self._dealing = dealing
        self._teller = lasting.teller
        self._pace = lasting.pace
        self._repetition = lasting.repetition
        self._peers = Peers(lasting.session, replica.state, self._healed, self._before_change)
        self.world.apart = True

    def _before_change(self) -> None:
        if self.checkpoints:
            self.checkpoints.before_update()

    # -- a step --------------------------------------------------------------------------------

    def begin(self, share: Share, together: bool) -> None:
        self._share = share

    def stepped(self, epoch_over: bool) -> None:
        # Of those that there are now; the data was shared out to those that there were.
        self._peers.stepped(self._share.part * self._dealing.ranks / self.world.size)
        if epoch_over and self._dealing.ranks != self.world.size:
            # A new epoch is shared out to those who are left.
            self._dealing.deal()

    def hold(self) -> None:
        self._peers.hold()

    # -- who is there --------------------------------------------------------------------------

    def park(self, idle: Callable[[], None]) -> bool | None:
        over = self.world.park(self._peers.wanted)
        if over is not None:
            return over
        if not self._peers.join():
            return self.world.park()
        self._part()
        return None

    def _part(self) -> None:
        """From now on each rank trains by itself."""
        self.group.park(self.world.part, self.world.size)
        self._health.apart = True

    def open(self) -> None:
        # A spare that has joined has parted already.
        if not self._health.apart:
            self._part()
            self._peers.open()

    def interrupted(self, lost: bool) -> None:
        self._health.apart = False
        if lost:
            self._peers.reset()

    def recovered(self, recovery: Recovered) -> bool:
        self._peers.recovered(recovery.healing.before.epoch)
        # All else has been told when it was worked out.
        return bool(recovery.healing.dead)

    def _healed(self, healing: Healing) -> None:
        """Ranks have failed, and others go on without having stopped."""
        world, replica = self.world, self.replica
        self._pace.lap()
        now, step = time.time(), replica.state.step if replica.begun else -1
        recovery = Recovered(healing, Transfer(0, (), step, step), now, now, 1)
        self._teller.recovered(recovery)
        if world.membership is not healing.after:
            # All have agreed on another since.
            return
        if self._health.apart:
            self._part()
            self._dealing.resized(len(healing.before.active))
            if world.logical == 0 and healing.before.logical(world.world):
                self._save_alone()
        world.send_role()
        self._repetition.look(recovery)

    # -- saving, and the end -------------------------------------------------------------------

    def save_with(self) -> None:
        if not self.checkpoints:
            return
        if self._health.apart:
            self._save_alone()
        else:
            comm = self.world.active
            assert comm is not None
            self.checkpoints.attach_alone(comm, self.replica.state, comm.rank == 0)

    def _save_alone(self) -> None:
        """Have rank 0 save, and not come together with others for it."""
        if self.checkpoints:
            first = self.world.logical == 0
            self.checkpoints.attach_alone(None, self.replica.state, first)
            if first:
                self.checkpoints.take_over()

    def gather(self, leaving: bool) -> bool:
        self._peers.finish()
        self._health.apart = False
        assert self.world.active is not None
        self.group.attach(self.world.active)
        if not self._average() or self._health.failed_anywhere():
            raise StepInterrupted
        self.replica.renew()
        if not self.checkpoints:
            return leaving
        self.save_with()
        # One may have been asked to leave when another was at the end already.
        return self.checkpoints.any_rank(leaving)

    def _average(self) -> bool:
        """Have all ranks hold the average of what they have; collective.

        Returns
        -------
        False if a rank has failed; then it has changed nothing.
        """
        group, state = self.group, self.replica.state
        flat = Flat(
            [
                *(p for module in state.modules() for p in module.parameters()),
                *state.buffers(),
            ]
        )
        average = flat.read(flat.empty()).mul_(1 / group.size())
        group.allreduce([average])
        # Counts cannot be averaged; they are rank 0's.
        counts = [buffer for buffer in state.buffers() if not buffer.is_floating_point()]
        taken = [count.clone() for count in counts]
        for count in taken:
            group.broadcast([count])
        if group.failure is not None:
            return False
        flat.write(average)
        for count, its in zip(counts, taken, strict=True):
            count.copy_(its)
        return True

    def again(self) -> None:
        self._part()
        self._peers.again()

    def close(self) -> None:
        self._peers.close()
