"""The recoverable world over MPI: how survivors come to the same new world.

All processes, spares included, share the *pool* communicator; those that train share *active*, in
which the rank is the logical rank. Each process is in one of these states::

          +---------------------------- RUN (active) / PARKED (spare) <-----------+
          |                                |                                      |
          | train() returned               | an MPI error, news of a death,       |
          | (spare: told "finish")         | or the pool was revoked              |
          v                                v                                      |
       FINISH: agree(1)                 REVOKE: revoke active and pool            |
          |        \\                       |                                      |
          |         \\ 0                    v                                      |
          v          +-----------------> agree(0)                                 |
        OVER                               |                                      |
                                           v                                      |
                        +------------> SHRINK the pool                            |
                        |                  v                                      |
                        +--- 0 -------- agree(1 if that went well here)           |
                        |                  v 1                                    |
                        |              EXCHANGE reports (who, how far, how whole) |
                        |                  v                                      |
                        |              PLAN: heal() on equal input                |
                        |                  v                                      |
                        |              BUILD active from the plan                 |
                        |                  v                                      |
                        +--- 0 -------- agree(1 if all went well here)            |
                        |                  v 1                                    |
                        |              WARM: has who is to train a script?        |
                        +--- no ------- agree(1 once it has)                      |
                        |                  v yes                                  |
                        |              TRANSFER the state to whom lacks it        |
                        |                  v                                      |
                        +--- 0, or ---- agree(1 if that went well here) --- 1 ----+
                             a failure

What each knows where:

* ``agree`` is MPI_Comm_agree (Bland et al., "Post-failure recovery of MPI communication
  capability", IJHPCA 2013): all survivors get the same answer, and if there is a failure that not
  all have acknowledged, all get the same error. It works on a revoked communicator. Every decision
  to leave a state together is one agreement on the current pool; the order of agreements on a pool
  is the same for everybody, whichever way they came, so one that wants to finish and one that has
  seen a failure meet in the same call.
* Before an agreement, others may have seen more or less than I have: an MPI call that failed here
  may have worked there. After it, all know that all are in the same state.
* An agreement that raises an error has an answer all the same, which is that of all survivors. So
  FINISH needs no recovery where only spares have died: if all answer 1 they acknowledge the dead,
  and agree again, on none of them having been active.
* SHRINK makes all know the same set of survivors; it and the last agreed membership are the input
  of PLAN, so that no negotiation is needed. It is agreed on over the old pool, for in Open MPI it
  can fail here and work there; from then on the new pool is what all have.
* Before TRANSFER all have the new active communicator, so that who meets a failure in it can stop
  all others by revoking it.
* The membership changes only by the last agreement. A recovery that is itself hit by a failure
  leaves no trace: it starts again at SHRINK from the last agreed membership.
* Nothing of a survivor is overwritten before the last agreement (a spare's state is worthless and
  may be).
* Nobody need have died. Ranks that are slow change places with spares in the same way: all active
  ranks have come to the end of the same step (:mod:`hpcft.world.departure`), and those that are to
  step down say so in their reports. If somebody dies meanwhile, that is healed, and they stay.
* A spare that is cold has let go of what its script had made (:mod:`hpcft.train.cooled`). Others
  are adopted before it. If it is to train all the same nothing is built: at WARM it runs its
  script, and comes back to the agreement in which all others wait for it; then all go again from
  SHRINK.
* Where TRANSFER finds that scripts have to be run anew, it moves nothing; after the last agreement
  all leave RUN, or PARKED, and come back to it from the beginning of the script
  (:mod:`hpcft.world.script`).

The pure part is :mod:`hpcft.world.membership`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import astuple, dataclass, field
from typing import cast

import numpy as np
from mpi4py import MPI

from hpcft.errors import StateLost, TooFewRanks
from hpcft.world.link import Link
from hpcft.world.membership import Healing, Membership, Policy, heal
from hpcft.world.progress import Progress

_FINISH_TAG = 7
#: What the others may call for.
_TO_FINISH, _TO_RECOVER = "finish", "recover"
#: Begins each report that has arrived whole.
_WHOLE = 0x68706366745F7271
#: In place of a logical rank: of a spare, and of who has died.
_PARKED, _GONE = -1, -2
#: So often may an attempt fail by something else than a death before that is taken for an error.
_MOST_ALIKE = 3
#: Between two looks at whether an agreement is reached.
_NAP = 1e-4
#: How often a parked spare looks by itself; news from the shepherd wake it at once.
_PARKED_LOOK = 0.05


@dataclass(frozen=True)
class Report:
    """What a process says about itself when a recovery begins.

    world: its world rank.
    step: steps completed; -1 without a state, like a spare.
    whole: its state can be handed to others as it is.
    broken: it has been hit in the middle of a step, and what it holds is no state at all.
    anew: its script has to be run anew: it has not come to training yet, or its state is shards,
        of which those that are lost cannot be had from others.
    slow: it is slower than the others, or was when it last trained.
    steps_down: it is to change places with a spare, and all ranks have completed the same step.
    cold: it is a spare that has to run its script before it can train.
    tight: it is on a machine without memory to spare.
    """

    world: int
    step: int
    whole: bool
    broken: bool
    anew: bool = False
    slow: bool = False
    steps_down: bool = False
    cold: bool = False
    tight: bool = False


@dataclass(frozen=True)
class Transfer:
    """Who gives its state to whom, in ranks of the new active communicator.

    step: the step the state belongs to; -1 if the source first has to restore one.
    newest: the newest step any survivor had completed; above ``step`` if its state is no good, -1
        if no survivor had a state.
    anew: nothing is moved; all run their scripts anew, and go on from a checkpoint if there is one.
        Until then ``step`` is -1.
    """

    source: int
    receivers: tuple[int, ...]
    step: int
    newest: int
    anew: bool = False


@dataclass
class _Outcome:
    """Whether all went well here: 1 or 0, as agreements take it."""

    good: int = 1


@dataclass
class Recovered:
    """A recovery all have agreed on.

    began: when this process began it; seconds since 1970.
    phases: seconds spent in shrinking, planning and building, state transfer, last agreement.
    attempts: how often it had to start again because of another failure.
    """

    healing: Healing
    transfer: Transfer
    began: float
    ended: float
    attempts: int
    phases: dict[str, float] = field(default_factory=dict)


def state_lost() -> StateLost:
    """The error of a run in which nobody has a state."""
    return StateLost(
        "no survivor holds a whole copy of the training state: all ranks that did have failed, "
        "and there is no checkpoint",
        "start again; with --ckpt-dir the next run will have something to go on from",
    )


def plan_transfer(
    membership: Membership,
    reports: Mapping[int, Report],
    restorable: bool = False,
    apart: bool = False,
) -> Transfer:
    """Whose state is taken, and who needs it.

    The most advanced survivor's: a process can have applied step k while another's collective for k
    failed. A survivor hit between its optimizer's step and the commit is passed over for one at
    the edge of a step, for whatever its script did with collectives in between saw a broken world.

    Where that is of no use (shards) or there is none yet, all run their scripts anew: from a
    checkpoint, or from the beginning if no step has been completed.

    Parameters
    ----------
    restorable: there may be a checkpoint, from which can be brought back what all have lost.
    apart: ranks may be at different steps, and hold different things; who has a state keeps it.

    Raises
    ------
    StateLost: nobody in the membership has a state, and it is not restorable.
    """
    holders = [w for w in membership.active if reports[w].step >= 0 and not reports[w].broken]
    newest = max(report.step for report in reports.values())
    begun = newest != 0
    anew = any(report.anew for report in reports.values())
    if anew and begun and not restorable:
        raise state_lost()
    if anew or (not holders and not begun):
        return Transfer(0, (), -1, newest, anew=True)
    if not holders and restorable:
        return Transfer(0, tuple(range(1, len(membership.active))), -1, newest)
    if not holders:
        raise state_lost()
    best = max(holders, key=lambda w: (reports[w].whole, reports[w].step, -w))
    step = reports[best].step
    receivers = tuple(
        logical
        for logical, w in enumerate(membership.active)
        if w != best
        and (
            reports[w].step < 0
            or reports[w].broken
            # Before the first step even survivors may hold different things.
            or not (apart or (0 < step == reports[w].step and reports[w].whole))
        )
    )
    return Transfer(membership.active.index(best), receivers, step, newest)


def _stepping_down(membership: Membership, reports: Mapping[int, Report]) -> frozenset[int]:
    """Who is to change places with a spare; nobody, if they alone have the state."""
    leaving = frozenset(world for world, one in reports.items() if one.steps_down)
    staying = (reports[world] for world in membership.active if world in reports.keys() - leaving)
    left = any(one.step >= 0 and one.whole and not one.broken for one in staying)
    return leaving if left else frozenset()


class NotWarm(Exception):
    """This process is to train, and has to run its script before; the others wait for it."""


class World:
    """The world as this process knows it.

    Parameters
    ----------
    link: connection to the shepherd, or None when there is none (then failures are fatal).
    hosts: host name of every world rank.
    spares: how many of the last world ranks are parked.
    policy: what may be done about a failure.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        link: Link | None,
        hosts: Mapping[int, str],
        spares: int,
        policy: Policy,
    ) -> None:
        self.link = link
        self.progress = link.progress if link else Progress.create()
        self.hosts = hosts
        self.policy = policy
        self.world = comm.Get_rank()
        self.world_size = comm.Get_size()
        self.launched = Membership.launch(comm.Get_size(), spares)
        self.membership = self.launched
        self._pool = comm.Dup()
        self._pool.Set_errhandler(MPI.ERRORS_RETURN)
        #: The membership that the pool was made for.
        self.agreed = self.launched
        #: Whether the state can be brought back should all have lost it; the same in all.
        self.restorable = False
        #: Whether ranks may be at different steps, and in a membership that is not agreed on.
        self.apart = False
        #: Whether the others wait, in a recovery, until this process has run its script.
        self.awaited = False
        #: When the recovery under way began, and how long all have waited in it for cold spares.
        self._began: float | None = None
        self._warming = 0.0
        #: What went wrong, other than in MPI, in the last attempt to recover.
        self._trouble: Exception | None = None
        self.active: MPI.Intracomm | None = None
        self.active = self._build(self._pool, self.membership)

    @property
    def logical(self) -> int | None:
        """This process's logical rank, None while it is a spare."""
        return self.membership.logical(self.world)

    @property
    def size(self) -> int:
        """Number of ranks that train."""
        return len(self.membership.active)

    @property
    def part(self) -> int:
        """Logical rank that this process's script plays; on a spare the last.

        So what a script does in rank 0 alone (printing, saving) it does not on spares.
        """
        return self.size - 1 if self.logical is None else self.logical

    def send_role(self) -> None:
        """Let the shepherd know who this process is now."""
        assert self.link is not None
        members = self.membership
        self.link.send("role", logical=self.logical, active=members.active, epoch=members.epoch)

    def _build(self, pool: MPI.Intracomm, membership: Membership) -> MPI.Intracomm | None:
        logical = membership.logical(self.world)
        color = MPI.UNDEFINED if logical is None else 0
        comm = cast(MPI.Intracomm, pool.Split(color, logical or 0))
        if comm == MPI.COMM_NULL:
            return None
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        return comm

    def broken(self) -> bool:
        """Whether an active rank is known to have failed. Cheap; no MPI."""
        if self.link is None:
            return False
        return not self.link.failures.keys().isdisjoint(self.membership.active)

    def finish(self) -> bool:
        """Agree with all others that training is over. For active ranks.

        Returns
        -------
        True if it is over; False if an active rank failed, or has seen a failure: then recover.
        """
        assert self.active is not None
        self.progress.enter()
        try:
            try:
                self.active.Barrier()
                over = 1
            except MPI.Exception:
                self._revoke()
                over = 0
            # From every rank, so that one that dies here leaves no spare waiting.
            for spare in self.membership.spares if over else ():
                # One that is dead waits for nothing.
                with contextlib.suppress(MPI.Exception):
                    self._pool.Isend(b"", self._pool_rank(spare), _FINISH_TAG)
            return self._agree_over(over)
        finally:
            self.progress.leave()

    def park(
        self,
        wanted: Callable[[], bool] | None = None,
        idle: Callable[[], None] = lambda: None,
    ) -> bool | None:
        """Wait, as a spare, for the end of training or for a failure.

        Parameters
        ----------
        wanted: looks whether this spare is to train, where ranks heal without agreeing on it.
        idle: called now and then while there is nothing to do; it returns once :meth:`called`.

        Returns
        -------
        True if training is over; False if an active rank failed, or others recover, or ranks are to
        step down: then recover. None if it is wanted.
        """
        assert self.link is not None
        while True:
            self.link.news.wait(_PARKED_LOOK)
            # Before looking, so that what comes in between is seen next time.
            self.link.news.clear()
            if wanted is None and self.broken():
                break
            if wanted and wanted():
                return None
            if call := self._called():
                if call == _TO_FINISH:
                    return self._agree_over(1)
                break
            idle()
        self._revoke()
        return self._agree(0)

    def called(self) -> bool:
        """Whether others want an agreement of all; for who does without as long as nobody does."""
        return bool(self._called())

    def _called(self) -> str:
        """What others want: that training is over, to recover, or nothing."""
        try:
            return _TO_FINISH if self._pool.Iprobe(MPI.ANY_SOURCE, _FINISH_TAG) else ""
        except MPI.Exception as error:
            if error.Get_error_class() == MPI.ERR_REVOKED:
                return _TO_RECOVER
            # Somebody is gone. Acknowledged, it no longer keeps us from probing.
            self._pool.Ack_failed()
            return ""

    def gather(self) -> None:
        """Wait for all active ranks, so that none is still in a collective that others are past.

        Who is the first to be through may revoke before all are: then they have all come as well.
        """
        assert self.active is not None
        with self.progress.waiting(), contextlib.suppress(MPI.Exception):
            self.active.Barrier()

    def _pool_rank(self, world: int) -> int:
        # The pool keeps the order of world ranks, for shrinking does.
        return self.agreed.members.index(world)

    def _revoke(self) -> None:
        if self.active is not None:
            self.active.Revoke()
        self._pool.Revoke()

    def _agree_over(self, over: int) -> bool:
        """Agree that training is over; that spares have died is no reason to recover."""
        answer, died = self._ask(over)
        while answer and died:
            # All are here again, for who recovers has answered 0.
            self._pool.Ack_failed()
            answer, died = self._ask(int(not self._active_lost()))
        return answer

    def _active_lost(self) -> bool:
        """Whether one of the acknowledged dead is an active rank."""
        failed, members = self._pool.Get_failed(), self.agreed.members
        ranks = failed.Translate_ranks(None, self._pool.Get_group())
        return not {members[rank] for rank in ranks}.isdisjoint(self.membership.active)

    def _agree(self, flag: int) -> bool:
        answer, died = self._ask(flag)
        return answer and not died

    def _ask(self, flag: int, mending: bool = True) -> tuple[bool, bool]:
        """The answer of an agreement, and whether it tells of a death not acknowledged by all.

        Parameters
        ----------
        mending: whether all others are about to come to it.
        """
        answer = np.array([flag], dtype=np.intc)
        self.progress.enter()
        try:
            with self.progress.mending(mending):
                request = self._pool.Iagree(answer)
                # Others may be long in coming, computing or moving the state: leave them the
                # processor.
                while not request.Test():
                    time.sleep(_NAP)
            return bool(answer[0]), False
        except MPI.Exception:
            return bool(answer[0]), True
        finally:
            self.progress.leave()

    def recover(
        self,
        report: Report,
        transfer: Callable[[MPI.Intracomm, Transfer], None],
        agreed: bool = False,
    ) -> Recovered:
        """Come to a new world with the other survivors.

        Parameters
        ----------
        report: how far this process is.
        transfer: called with the new active communicator and what is to be moved, in the processes
            that are in it. It must leave a survivor's state untouched until this method returns.
        agreed: the agreement to recover has been made already, by :meth:`finish` or :meth:`park`.

        Raises
        ------
        TooFewRanks, StateLost: there is no way to go on; the same in all survivors.
        NotWarm: this process is cold and to train; to be called again once its script has run.
        """
        self._began = began = self._began or time.time()
        self.progress.enter()
        try:
            if self.awaited:
                self.awaited = False
                # Whatever the answer is, all go on with another attempt.
                self._agree(1)
            elif not agreed:
                self._revoke()
                self._agree(0)
            attempts = alike = 0
            while True:
                attempts += 1
                size = self._pool.Get_size()
                with self.progress.mending():
                    result = self._attempt(report, transfer)
                if result is not None:
                    break
                nobody_died = self._pool.Get_size() == size
                alike = alike + 1 if self._trouble is not None and nobody_died else 0
                if self._trouble is not None and alike == _MOST_ALIKE:
                    raise self._trouble
            healing, plan, active, phases = result
        finally:
            self.progress.leave()
        if self._warming:
            phases["warm_s"] = self._warming
        self._began, self._warming = None, 0.0
        self.membership = self.agreed = healing.after
        self.active = active
        return Recovered(healing, plan, began, time.time(), attempts, phases)

    def _exchange(self, pool: MPI.Intracomm, report: Report) -> dict[int, Report]:
        """Everybody's report, by world rank.

        Raises
        ------
        ConnectionError: not all of them have arrived whole.
        """
        mine = (_WHOLE, *map(int, astuple(report)))
        rows = np.zeros((pool.Get_size(), len(mine)), dtype=np.int64)
        pool.Allgather(np.array(mine, dtype=np.int64), rows)
        if (rows[:, 0] != _WHOLE).any():
            raise ConnectionError("a failure has cut the exchange of reports short")
        return {
            int(world): Report(int(world), int(step), *map(bool, flags))
            for _, world, step, *flags in rows
        }

    def _latest(self, pool: MPI.Intracomm) -> Membership:
        """The membership to heal, of those that the survivors have come to by themselves.

        Raises
        ------
        ConnectionError: not all of them have arrived whole.
        """
        mine = self.membership
        roles = {world: logical for logical, world in enumerate(mine.active)}
        roles |= dict.fromkeys(mine.spares, _PARKED)
        # By world rank: the part it plays.
        row = [_WHOLE, mine.epoch]
        row += [roles.get(world, _GONE) for world in range(self.world_size)]
        rows = np.zeros((pool.Get_size(), len(row)), dtype=np.int64)
        pool.Allgather(np.array(row, dtype=np.int64), rows)
        if (rows[:, 0] != _WHOLE).any():
            raise ConnectionError("a failure has cut the exchange of memberships short")
        # Of equals the lowest rank's.
        _, epoch, *parts = max(rows.tolist(), key=lambda found: found[1])
        active = [world for world, part in enumerate(parts) if part >= 0]
        spares = tuple(world for world, part in enumerate(parts) if part == _PARKED)
        return Membership(epoch, tuple(sorted(active, key=lambda world: parts[world])), spares)

    def _attempt(
        self, report: Report, transfer: Callable[[MPI.Intracomm, Transfer], None]
    ) -> tuple[Healing, Transfer, MPI.Intracomm | None, dict[str, float]] | None:
        """One way through the states from SHRINK on; None if it has to be gone again."""
        clock = time.perf_counter()
        phases: dict[str, float] = {}

        def lap(name: str) -> None:
            nonlocal clock
            now = time.perf_counter()
            phases[name] = now - clock
            clock = now

        pool = self._shrink()
        if pool is None:
            return None
        self._pool = pool
        lap("shrink_s")
        active: MPI.Intracomm | None = None
        fatal: TooFewRanks | StateLost | None = None
        healing: Healing | None = None
        plan: Transfer | None = None
        warming: set[int] = set()
        with self._trying() as built:
            reports = self._exchange(pool, report)
            before = self._latest(pool) if self.apart else self.membership
            cold = frozenset(world for world, one in reports.items() if one.cold)
            try:
                healing = heal(
                    before,
                    frozenset(reports),
                    self.hosts,
                    self.policy,
                    frozenset(world for world, one in reports.items() if one.slow),
                    _stepping_down(before, reports),
                    cold,
                    frozenset(world for world, one in reports.items() if one.tight),
                )
                plan = plan_transfer(healing.after, reports, self.restorable, self.apart)
            except (TooFewRanks, StateLost) as error:
                fatal = error
            else:
                # Who is to run its script anew with all others is not waited for.
                warming = set() if plan.anew else set(healing.after.active) & cold
                if not warming:
                    active = self._build(pool, healing.after)
        if not self._agree(built.good):
            return None
        lap("build_s")
        if fatal is not None:
            raise fatal
        if warming:
            self._wait_for_scripts(warming)
            return None
        assert healing is not None
        assert plan is not None
        with self._trying(active) as moved:
            if active is not None:
                # It may be much that has to be moved.
                with self.progress.mending(False):
                    transfer(active, plan)
        lap("transfer_s")
        if not self._agree(moved.good):
            return None
        lap("agree_s")
        return healing, plan, active, phases

    def _wait_for_scripts(self, warming: Set[int]) -> None:
        """Wait until those that are to train and are cold have run their scripts.

        Raises
        ------
        NotWarm: this is one of them.
        """
        if self.world in warming:
            self.awaited = True
            raise NotWarm
        began = time.monotonic()
        # That takes as long as a script does, and nobody is stuck for it.
        self.progress.run(False)
        self._ask(1, mending=False)
        self._warming += time.monotonic() - began

    def _shrink(self) -> MPI.Intracomm | None:
        """The pool without the dead, the same in all survivors; None if it has to be tried again.

        In Open MPI 5.0 a death during a shrink can make it fail in some processes and not in
        others, hence an agreement over it, on the pool that all have.
        """
        pool: MPI.Intracomm | None = None
        try:
            pool = cast(MPI.Intracomm, self._pool.Shrink())
            pool.Set_errhandler(MPI.ERRORS_RETURN)
            # Those known to be dead are no reason for the agreement to fail.
            self._pool.Ack_failed()
        except MPI.Exception:
            pool = None
        return pool if self._agree(int(pool is not None)) else None

    @contextlib.contextmanager
    def _trying(self, active: MPI.Intracomm | None = None) -> Iterator[_Outcome]:
        """Around calls that a death may cut short: if so, sees to it that all others stop, too.

        A death can surface as any exception: Open MPI 5.0 has been seen to leave a collective
        without an error, and without all of its data.
        """
        outcome = _Outcome()
        self._trouble = None
        try:
            yield outcome
        except Exception as error:
            outcome.good = 0
            self._trouble = None if isinstance(error, MPI.Exception) else error
            if active is not None:
                active.Revoke()
            self._pool.Revoke()
