"""One life of a campaign, failure by failure.

Events are what changes the course: a failure, a node that is back, one that turns slow, an orderly
interruption. What lies between two of them, training with its checkpoints, is computed in one go
(:meth:`_Life._train_for`). So the cost is that of the failures, not of the steps or the ranks.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from hpcft.foresight.scenario import Scenario, Tier
from hpcft.foresight.trace import Strike
from hpcft.report.goodput import Goodput

#: The parts of the time, as hpcft.report.goodput counts them.
_PARTS = tuple(part.name for part in fields(Goodput) if part.name not in ("whole", "measured"))
#: What is counted: failures of what trains and of what waits, and what was done about the former.
COUNTS = ("failures", "spare_failures", "adopted", "shrunk", "relaunched", "queued", "interrupted")
#: A failure during an answer makes the answer begin again; so often in a row, and it never ends.
_MOST_TRIES = 100_000


@dataclass(frozen=True)
class Life:
    """How it went.

    goodput: where the time went.
    work: seconds of steps that count, those on fewer nodes counted for as much less.
    counts: of each of :data:`COUNTS`, how often.
    short: seconds in which fewer than all nodes trained, or none for want of them.
    least: how few trained at the least.
    """

    goodput: Goodput
    work: float
    counts: dict[str, int]
    short: float
    least: int


class _Over(Exception):
    """The campaign's time is up."""


def live(
    scenario: Scenario, rng: np.random.Generator, trace: Sequence[Strike] | None = None
) -> Life:
    """Play a campaign through once.

    Parameters
    ----------
    trace: failures, in place of those drawn by the scenario's hazards.
    """
    return _Life(scenario, rng, trace).live()


class _Life:
    def __init__(
        self, scenario: Scenario, rng: np.random.Generator, trace: Sequence[Strike] | None
    ) -> None:
        self._of, self._rng = scenario, rng
        self._trace = None if trace is None else deque(trace)
        machine = scenario.machine
        self._all = machine.nodes + machine.spares
        self._end = max(0.0, scenario.seconds - scenario.stack.end)
        self._now = 0.0
        #: Nodes of the run that work, those of them that train, those that lie ready for when all
        #: ranks are started again, and when the others are back.
        self._pool = self._all
        self._active = machine.nodes
        self._ready = 0
        self._back: list[float] = []
        self._parts = dict.fromkeys(_PARTS, 0.0)
        self._counts = dict.fromkeys(COUNTS, 0)
        self._short = 0.0
        self._least = machine.nodes
        #: Work that counts: all of it, and the same less what was done on fewer nodes.
        self._kept = self._work = 0.0
        #: Work since the last file, and how many near checkpoints there are since then.
        self._since, self._nears = 0.0, 0
        #: The same as ``_work``, of what was done since the last file.
        self._work_since = 0.0
        self._filed_at = -math.inf
        self._tiers()
        hazards = scenario.hazards
        self._rate = scenario.failure_rate
        self._scale = 1 / math.gamma(1 + 1 / hazards.shape)
        self._slow_rate = machine.nodes / hazards.slow
        self._failure = self._next_failure()
        self._slow = self._after(1 / self._slow_rate if self._slow_rate else math.inf)
        self._slow_until = -math.inf
        self._preemption = self._after(hazards.preempted)
        self._limit = scenario.site.limit

    def _tiers(self) -> None:
        """Checkpoints as cycles: so many near ones, and then a file."""
        near, file = self._of.saves.near, self._of.saves.file
        first = near or file or Tier(math.inf, 0.0)
        self._near_every, self._near_cost = first.interval, near.cost if near else 0.0
        self._nears_a_file = math.inf
        if file:
            self._nears_a_file = max(1, round(file.interval / first.interval)) if near else 1
        self._file_cost = file.cost if file else 0.0

    def live(self) -> Life:
        try:
            self._heal(0, False, cold=True)
            while True:
                self._train()
        except _Over:
            pass
        self._parts["ending"] = self._of.seconds - self._end
        goodput = Goodput(whole=self._of.seconds, measured=1.0, **self._parts)
        return Life(goodput, self._work, self._counts, self._short, self._least)

    def _after(self, mean: float) -> float:
        if math.isinf(mean):
            return math.inf
        return self._now + self._rng.exponential(mean)

    def _next_failure(self) -> float:
        """When something fails next, of what can fail from now on."""
        if self._trace is not None:
            while self._trace and self._trace[0].at <= self._now:
                self._trace.popleft()
            return self._trace[0].at if self._trace else math.inf
        if not self._rate:
            return math.inf
        drawn = float(self._rng.weibull(self._of.hazards.shape))
        # At a shape of far less than 1 a draw can be zero, and time would stand still.
        return self._now + max(1e-9, drawn * self._scale / self._rate)

    def _train(self) -> None:
        """Until something happens, and see to that."""
        slow = self._slow_until > self._now
        back = self._back[0] if self._back else math.inf
        changes = self._slow_until if slow else math.inf
        orderly = min(self._preemption, self._limit)
        until = min(self._failure, back, self._slow, changes, orderly, self._end)
        # A job that takes longer to start than it may run is over when it has started.
        self._train_for(max(0.0, until - self._now), self._of.hazards.slowdown if slow else 1.0)
        if self._now >= self._end:
            raise _Over
        if until == self._failure:
            lost, job = self._strike()
            if lost or job:
                self._heal(lost, job)
        elif until == back:
            self._collect()
            self._take_in()
        elif until == orderly:
            self._interrupt()
        elif until == self._slow:
            self._slow_until = max(self._slow_until, self._now) + self._of.hazards.slow_for
            self._slow = self._after(1 / self._slow_rate)

    def _train_for(self, seconds: float, pace: float) -> None:
        """Steps and checkpoints, for so long.

        A checkpoint that was broken off is made anew when training goes on.
        """
        every, cost = self._near_every, self._near_cost
        turn = every * pace + cost
        cycle = self._nears_a_file * turn + self._file_cost
        at = self._since * pace + self._nears * cost + seconds
        if math.isinf(cycle):
            files, at = 0.0, at
        else:
            files, at = divmod(at, cycle)
        nears = 0.0 if math.isinf(turn) else min(at // turn, self._nears_a_file)
        inside = at - nears * turn if nears else at
        since = nears * every if nears else 0.0
        if nears < self._nears_a_file:
            since += min(inside / pace, every)
        done = since - self._since
        if files:
            done += files * self._nears_a_file * every
            self._filed_at = self._now + seconds - at
        done = max(0.0, done)
        self._since, self._nears = since, int(nears)
        self._now += seconds
        self._kept += done
        machine, waiting = self._of.machine, done * self._of.stack.waiting
        share = self._active / machine.nodes
        self._work += done * share
        if files:
            self._work_since = since * share
        else:
            self._work_since += done * share
        # Who is slow computes while the others wait.
        waiting += done * (pace - 1) * (1 - 1 / (self._active * machine.ranks_per_node))
        self._parts["steps"] += done * pace - waiting
        self._parts["waiting"] += waiting
        self._parts["saving"] += max(0.0, seconds - done * pace)
        if share < 1:
            self._short += seconds

    def _strike(self) -> tuple[int, bool]:
        """A failure happens now: how many nodes that train it takes, and whether all ranks."""
        hazards, machine, rng = self._of.hazards, self._of.machine, self._rng
        if self._trace:
            strike = self._trace.popleft()
            # Others may strike at the very same time.
            self._failure = self._trace[0].at if self._trace else math.inf
            return self._struck(strike)
        self._failure = self._next_failure()
        which = rng.random() * self._rate
        alone = self._all / hazards.node
        if which < alone:
            # A node that is being repaired does not fail: such draws count for nothing.
            if rng.random() * self._all >= self._pool:
                return 0, False
            return self._fell(1), False
        if which < alone + math.ceil(self._all / machine.rack) / hazards.rack:
            size = int(rng.binomial(min(machine.rack, self._all), self._pool / self._all))
            return self._fell(size), False
        self._counts["failures"] += 1
        return 0, True

    def _struck(self, strike: Strike) -> tuple[int, bool]:
        """As by :meth:`_strike`. Whoever has trained then trains now; a spare's failure strikes a
        spare, as long as there is one."""
        if not strike.nodes:
            self._counts["failures"] += 1
            return 0, True
        among = self._pool - self._active if strike.spare else self._active
        number = max(0, min(strike.nodes, among))
        return self._lost(number, 0 if strike.spare else number), False

    def _fell(self, number: int) -> int:
        """So many nodes that work fail; returns how many of them train."""
        number = min(number, self._pool)
        idle = self._pool - self._active
        hit = int(self._rng.hypergeometric(self._active, idle, number)) if idle > 0 else number
        return self._lost(number, hit)

    def _lost(self, number: int, hit: int) -> int:
        """So many are lost, of which ``hit`` trained."""
        rng, site = self._rng, self._of.site
        for _ in range(number):
            time = site.reboot if rng.random() < site.soft else rng.exponential(site.repair)
            heapq.heappush(self._back, self._now + time)
        self._pool -= number
        self._counts["failures"] += hit > 0
        self._counts["spare_failures"] += hit == 0 and number > 0
        return hit

    def _collect(self) -> None:
        """Nodes that are back by now."""
        while self._back and self._back[0] <= self._now:
            heapq.heappop(self._back)
            if self._of.stack.in_place and self._of.stack.rejoin:
                self._pool += 1
            else:
                # Nobody has it join those that train.
                self._ready += 1

    def _size(self) -> int:
        """How many nodes could train; 0 if that is too few."""
        nodes, by = self._of.machine.nodes, self._of.stack.by
        size = nodes if self._pool >= nodes else self._pool // by * by
        return size if size >= self._of.at_least else 0

    def _take_in(self) -> None:
        """Nodes that are back come to the others, between two steps."""
        stack = self._of.stack
        if not stack.in_place or not stack.rejoin:
            return
        struck = self._passes("resize", stack.resize)
        if struck:
            self._heal(*struck)
        else:
            self._resized(max(self._size(), self._active))

    def _resized(self, size: int) -> None:
        self._active = size
        self._least = min(self._least, size)

    def _passes(self, doing: str, seconds: float, safe: bool = False) -> tuple[int, bool] | None:
        """Let time pass; if a failure of what trains breaks it off (never, if ``safe``), what it
        has taken."""
        until = self._now + seconds
        while True:
            at = min(until, self._end if safe else min(self._failure, self._end))
            self._parts[doing] += at - self._now
            self._now = at
            if at >= self._end:
                raise _Over
            if at == until:
                if self._failure <= at:
                    # While no rank runs none fails.
                    self._failure = self._next_failure()
                return None
            lost, job = self._strike()
            if lost or job:
                return lost, job

    def _heal(self, lost: int, job: bool, cold: bool = False) -> None:
        """Go on after a failure that has taken so many nodes that train, or all ranks.

        cold: the job has to be started; no memory of a former one is left.
        """
        stack, nodes = self._of.stack, self._of.machine.nodes
        begins = cold
        for _ in range(_MOST_TRIES):
            self._collect()
            alive = stack.in_place and not job and not cold and lost < self._active
            if not alive or not self._size():
                # All ranks are started again, on whatever there is.
                alive, job = False, True
                self._pool, self._ready = self._pool + self._ready, 0
            size = self._size()
            if not size:
                if stack.short == "wait" and self._back:
                    self._short += max(0.0, min(self._back[0], self._end) - self._now)
                    self._passes("restart", self._back[0] - self._now, safe=True)
                    job = True
                else:
                    self._queue()
                    cold = True
                continue
            memory = not cold and lost <= self._of.saves.near_survives
            near = self._of.saves.near if memory else None
            tier = near or self._of.saves.file
            restore = tier.restore if tier and not begins else 0.0
            if cold:
                doing, seconds = "starting", stack.start + restore
            elif not alive:
                doing, seconds = "relaunch", stack.detect + stack.relaunch + restore
            else:
                answer = stack.adopt if size >= nodes else stack.shrink
                doing = "recovery"
                seconds = stack.detect + answer + (restore if stack.sharded else 0.0)
            struck = self._passes(doing, seconds)
            if not struck:
                break
            lost, job = lost + struck[0], job or struck[1]
        else:
            raise _Over
        if alive and not stack.sharded:
            self._again(min(stack.step / 2, self._since_near()))
        elif near:
            self._again(self._since_near())
        else:
            self._back_to_file()
        if not begins and not cold:
            took = "adopted" if size >= nodes else "shrunk"
            self._counts[took if alive else "relaunched"] += 1
        self._resized(size)

    def _since_near(self) -> float:
        """Work since the last near checkpoint, or file."""
        return self._since - (self._nears * self._near_every if self._nears else 0.0)

    def _again(self, work: float) -> None:
        """So much work is lost, the newest first."""
        work = min(max(0.0, work), self._kept)
        new = min(work, self._since)
        on_fewer = self._work_since * new / self._since if self._since else 0.0
        before = self._kept - self._since
        on_fewer_before = (self._work - self._work_since) * (work - new) / before if before else 0.0
        self._kept -= work
        self._since -= new
        self._work_since -= on_fewer
        self._work = max(0.0, self._work - on_fewer - on_fewer_before)
        waited = work * self._of.stack.waiting
        self._parts["steps"] -= work - waited
        self._parts["waiting"] -= waited
        self._parts["again"] += work

    def _back_to_file(self) -> None:
        file = self._of.saves.file
        if not file:
            self._again(self._kept)
        else:
            lost = self._since
            if self._now - self._filed_at < file.write:
                # It was still being written.
                lost += self._nears_a_file * self._near_every
            self._again(lost)
        self._since, self._work_since, self._nears = 0.0, 0.0, 0
        self._filed_at = -math.inf

    def _queue(self) -> None:
        """Wait for other nodes, all of them good."""
        self._counts["queued"] += 1
        wait = float(self._rng.exponential(self._of.site.queue)) if self._of.site.queue else 0.0
        self._short += min(wait, self._end - self._now)
        self._passes("restart", wait, safe=True)
        self._pool, self._ready, self._back = self._all, 0, []
        self._failure = self._next_failure()
        self._preemption = self._after(self._of.hazards.preempted)
        self._limit = self._now + self._of.site.limit
        self._slow_until = -math.inf

    def _interrupt(self) -> None:
        """An orderly end: all save and leave, and queue again."""
        self._counts["interrupted"] += 1
        file = self._of.saves.file
        if file:
            if self._passes("saving", file.cost + file.write):
                # Taken by a failure in the middle of it; it has to leave all the same.
                self._back_to_file()
            self._since, self._work_since, self._nears = 0.0, 0.0, 0
        self._queue()
        self._heal(0, False, cold=True)
