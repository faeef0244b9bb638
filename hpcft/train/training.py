"""A training in this process, from failure to failure."""

from __future__ import annotations

import enum
import traceback
from collections.abc import Callable

from mpi4py import MPI

from hpcft.errors import INTERRUPTED, HpcftError
from hpcft.train.buckets import Buckets
from hpcft.train.comm_ranks import CommRanks
from hpcft.train.dealing import Dealing, OnShrink
from hpcft.train.departing import Departing, Leaving, Replacing
from hpcft.train.dry import DrySteps
from hpcft.train.edges import Edges
from hpcft.train.healing import Healer, Recovery
from hpcft.train.health import Health
from hpcft.train.interruption import Late, LetGo, StepInterrupted
from hpcft.train.lasting import Lasting
from hpcft.train.modes.choice import choose
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.replica import Replica
from hpcft.train.seeds import Seeds
from hpcft.train.state import State
from hpcft.train.transfer import Arrival, give
from hpcft.world.recovery import Transfer


class Outcome(enum.Enum):
    """How a stretch of training ended.

    OVER: all ranks have agreed that training is over.
    AGREED: all have agreed to recover.
    BROKEN_OFF: this rank has met a failure; the others do not know yet.
    """

    OVER = enum.auto()
    AGREED = enum.auto()
    BROKEN_OFF = enum.auto()


class Training:
    """What :meth:`hpcft.train.job.Job.run` does.

    Parameters
    ----------
    healer: comes to the next membership.
    epoch: of the membership that this run of the script was made for.

    Raises
    ------
    HpcftError: the state cannot be trained as the user wants it.
    """

    def __init__(
        self,
        train: Callable[[State], None],
        state: State,
        lasting: Lasting,
        group: WorldProcessGroup,
        healer: Healer,
        epoch: int,
        seed: int,
        on_shrink: OnShrink,
    ) -> None:
        if not list(state.optimizers()):
            raise HpcftError(
                "the state tracks no optimizer", "give it to hpcft.State(optimizer=...)"
            )
        self._lasting = lasting
        self._options = lasting.session.options
        self._world = world = lasting.session.world
        self._teller = lasting.teller
        self._pace = lasting.pace
        self._checkpoints = lasting.checkpoints
        self._group = group
        self._healer = healer
        self._epoch = epoch
        self._train = train
        self._state = state
        #: Whether all leave, and whether another launch follows at once.
        self._leaving = self._resizing = False
        self._replica = Replica(state, begun=world.logical == 0)
        self._health = Health(group, world)
        launched = self._options["initial"] or len(world.launched.active)
        balanced = bool(self._options.get("balance"))
        self._dealing = Dealing(state, world, on_shrink, launched, balanced)
        self._buckets = Buckets(state.modules())
        self._dry = DrySteps(train, state, world, group, self._buckets)
        self._departing = Departing(state, world, group, self._health, self._teller)
        self._strategy = choose(lasting, group, self._replica, self._health, self._dealing)
        self._edges = Edges(
            lasting,
            group,
            self._replica,
            self._strategy,
            self._dealing,
            Seeds(seed),
            self._health,
            self._departing,
            self._dry,
            self._buckets,
        )
        self._edges.place()

    @property
    def _spare(self) -> bool:
        return self._world.logical is None

    def run(self) -> None:
        """Train, whatever happens to the ranks, until all agree that it is over.

        Raises
        ------
        TooFewRanks, StateLost, ScriptInterrupted: as :meth:`hpcft.train.job.Job.run`.
        SystemExit: nothing is left to do for this process.
        """
        if self._spare and self._options["warm"]:
            self._dry.warm_up()
        outcome = self._stretch()
        while outcome is not Outcome.OVER:
            # A script with shards is run anew.
            if not self._dry.warm and not self._state.sharded():
                self._dry.warm_up()
            elif not self._spare and not self._buckets.settled:
                self._dry.settle()
            self._recover(outcome is Outcome.AGREED)
            outcome = self._stretch()
        self._finish()

    def close(self) -> None:
        """The script has been unwound, to be run anew."""
        self._strategy.close()

    # -- between failures ----------------------------------------------------------------------

    def _stretch(self) -> Outcome:
        """Train, or wait as a spare, until all is over or somebody fails."""
        self._world.progress.run(not self._spare)
        self._leaving = self._resizing = False
        link = self._world.link
        try:
            if self._spare:
                assert link is not None
                link.departures.wait()
                if self._world.awaited:
                    return Outcome.AGREED
                link.send("warmth", bare=False)
                over = self._strategy.park(self._while_parked)
                if over is not None:
                    return Outcome.OVER if over else Outcome.AGREED
                self._join()
            elif self._world.membership.epoch == self._epoch:
                self._start()
            self._strategy.open()
            self._world.progress.step(self._state.step)
            if link:
                link.departures.begin(self._world.membership.epoch)
            while not self._trained():
                pass
        except (StepInterrupted, Replacing):
            return Outcome.BROKEN_OFF
        except MPI.Exception:
            return Outcome.BROKEN_OFF
        except HpcftError:
            if self._health.apart:
                self._healer.last_words()
            raise
        except Exception:
            # What a script does with the results of a broken world says nothing about the script.
            if not self._health.failed():
                raise
            self._edges.dropped()
            self._teller.say("hpcft: dropped, as a rank has failed: " + traceback.format_exc())
            return Outcome.BROKEN_OFF
        return Outcome.OVER if self._world.finish() else Outcome.AGREED

    def _while_parked(self) -> None:
        assert self._world.link is not None
        if self._world.link.bare:
            raise LetGo
        self._dry.probe()

    def _start(self) -> None:
        """Have all ranks begin with the state of rank 0."""
        comm, state = self._world.active, self._state
        assert comm is not None
        self._teller.started()
        with self._world.progress.waiting():
            if self._checkpoints:
                self._checkpoints.restore(state, comm)
                # Should a rank fail before all have it, this is what rank 0 gives them.
                self._replica.renew()
            if self._dealing.scales:
                saved_by = self._teller.saved_by(state.step) if comm.rank == 0 else None
                self._dealing.resized(CommRanks(comm).share(saved_by))
            if comm.size > 1 and not state.sharded():
                everybody = Transfer(0, tuple(range(1, comm.size)), 0, 0)
                if comm.rank == 0:
                    give(comm, everybody, state.take_apart())
                else:
                    arrival = Arrival(state, in_place=True)
                    arrival.receive(comm, everybody)
                    arrival.install()
        if self._checkpoints:
            self._checkpoints.check(state)
        self._take_part()
        self._teller.restored(state.step)

    def _join(self) -> None:
        """This process has got the state while the others trained on, and trains as well."""
        self._world.progress.run(True)
        self._take_part()
        self._teller.restored(self._state.step)

    def _take_part(self) -> None:
        """Go on with the state that this process has got, as the rank that it is."""
        self._replica.received()
        self._strategy.attend()
        self._edges.place()
        if self._world.active is not None:
            self._dealing.attend(self._world.active)
        self._strategy.save_with()

    def _recover(self, agreed: bool) -> None:
        """Come to the next membership."""
        steps_down, self._departing.steps_down = self._departing.steps_down, False
        recovery = Recovery(
            self._lasting,
            self._group,
            self._replica,
            self._strategy,
            self._dealing,
            steps_down,
            self._take_part,
        )
        recovery.run(self._healer, agreed)

    def _trained(self) -> bool:
        """Train up to the end, or to where all leave, and save what is to be saved.

        Returns
        -------
        False if training goes on: what the next launch was to go on from could not be saved.
        """
        try:
            while not self._in_time():
                self._catch_up()
        except Leaving:
            self._leaving = True
        self._leaving = self._strategy.gather(self._leaving)
        if not self._checkpoints:
            return True
        if self._leaving:
            link = self._world.link
            assert link is not None
            ends = self._checkpoints.any_rank(link.departures.end.asked)
            self._resizing = not ends
            resize = link.departures.resize
            if self._resizing and not self._checkpoints.hand_over(self._state, resize.durable):
                self._leaving = self._resizing = False
                resize.forget()
                link.send("stays")
                self._edges.begin()
                self._strategy.again()
                return False
        if not self._resizing:
            self._checkpoints.finish(self._state)
        return True

    def _in_time(self) -> bool:
        """Train; False if others have made a step without this rank."""
        try:
            self._train(self._state)
        except Late:
            return False
        return True

    def _catch_up(self) -> None:
        """Go on where the others are, who have made steps without this rank."""
        self._pace.late()
        self._strategy.catch_up()
        self._world.progress.step(self._state.step)
        self._edges.place()
        self._departing.look()

    # -- the end -------------------------------------------------------------------------------

    def _finish(self) -> None:
        link = self._world.link
        if link:
            link.departures.wait()
        self._world.progress.run(False)
        self._pace.close()
        if self._checkpoints and self._world.logical == 0:
            self._checkpoints.close()
        if link:
            link.send("agreed", handed_over=self._resizing)
        if self._spare:
            raise SystemExit(0)
        if self._resizing:
            self._teller.tell()
            self._teller.close()
            raise SystemExit(INTERRUPTED)
        if self._leaving:
            assert link is not None
            assert self._checkpoints is not None
            reason = link.departures.end.reason
            self._teller.interrupted(self._state.step, reason, self._checkpoints.newest)
            raise SystemExit(INTERRUPTED)
        # Of shards nobody has all bytes.
        wanted = self._options["digest"] and not self._state.sharded()
        digest = self._state.digest() if wanted and self._world.logical == 0 else None
        self._teller.finished(self._state.step, digest)
