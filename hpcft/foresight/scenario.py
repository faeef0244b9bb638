"""A campaign to be played through: the machine, what befalls it, and what the stack does about it.

All times are in seconds. The defaults are hpcft's own measured times (benchmarks/RESULTS.md) where
it has measured any; docs/foresight.md lists each with its source.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from hpcft.errors import UsageError
from hpcft.telemetry.published import NODE_HOURS

HOUR, DAY = 3600.0, 86400.0

#: What a run does that has lost more nodes than it has spares.
Short = Literal["shrink", "wait", "requeue"]
SHORT: tuple[Short, ...] = ("shrink", "wait", "requeue")
#: The most failures a life may have; more are a wrong rate, and would take for ever.
MOST_FAILURES = 5e6


@dataclass(frozen=True)
class Machine:
    """The nodes of the run.

    nodes: those that train.
    spares: nodes that wait, besides.
    ranks_per_node: for what is said of ranks; a node fails as one.
    rack: nodes that a failure of what they share (a switch, a power supply) takes at once.
    """

    nodes: int
    spares: int = 0
    ranks_per_node: int = 8
    rack: int = 16


@dataclass(frozen=True)
class Hazards:
    """What befalls it; mean times between, infinite for never.

    node: between failures of one node, whether it trains or waits.
    rack: between failures of one rack.
    job: between failures of the run as a whole: a file system, a bug, the power.
    shape: of the Weibull distribution of the time between failures of the whole machine. 1 is
        exponential; less than 1: failures come in clusters, as most records say.
    slow: between a node's turning slow.
    slowdown: by which factor a step takes longer while a node is slow.
    slow_for: how long it stays so, until it is replaced or recovers.
    preempted: between preemptions, or other orderly interruptions such as maintenance.
    """

    node: float = NODE_HOURS * HOUR
    rack: float = math.inf
    job: float = math.inf
    shape: float = 1.0
    slow: float = math.inf
    slowdown: float = 1.2
    slow_for: float = HOUR
    preempted: float = math.inf


@dataclass(frozen=True)
class Tier:
    """Checkpoints of one kind.

    interval: of training between two.
    cost: for which one holds training up.
    write: until one is safe, from when it began to be written in the background.
    restore: to read one back.
    """

    interval: float
    cost: float
    write: float = 0.0
    restore: float = 0.0


@dataclass(frozen=True)
class Saves:
    """Two tiers: in the nodes' memory, and in files.

    near: survives the loss of ``near_survives`` nodes at once, and ends with the run.
    file: survives all. Its interval is rounded to a multiple of the near one's.
    """

    file: Tier | None = field(default_factory=lambda: Tier(600.0, 0.2, 60.0, 60.0))
    near: Tier | None = None
    near_survives: int = 1


@dataclass(frozen=True)
class Stack:
    """What the software does, and how long that takes.

    in_place: whether survivors go on without a restart of all ranks.
    sharded: whether a lost rank's state is on no other rank, so that all go back to a checkpoint.
    step: of the training; half of one is done again after a failure, in the mean.
    waiting: part of the training in which ranks wait for slower ones, though none is slow.
    detect: until a failure is known.
    adopt: from then on: agreement, a new world, the state for the spare.
    shrink: the same without a spare.
    relaunch: from then on: all ranks started again where they are. Reading is extra.
    resize: all ranks launched anew as more.
    start: of the job, at first and after each wait in the queue.
    end: of the job, when the campaign is over: the last save, and leaving.
    short: what is done when there are more losses than spares.
    at_least: fewer nodes than that do not train; they wait in the queue. 0: half of them.
    by: nodes that a shrink takes at once, those of one replica of the model.
    rejoin: whether repaired nodes come back into the run; else they lie ready until all ranks are
        started again.
    """

    in_place: bool = True
    sharded: bool = False
    step: float = 5.0
    waiting: float = 0.0
    detect: float = 0.8
    adopt: float = 0.5
    shrink: float = 0.2
    relaunch: float = 5.0
    resize: float = 5.0
    start: float = 60.0
    end: float = 0.0
    short: Short = "shrink"
    at_least: int = 0
    by: int = 1
    rejoin: bool = True


@dataclass(frozen=True)
class Site:
    """Where it runs.

    repair: mean time until a failed node is back.
    soft: the part of node failures after which the node only has to be started again, ...
    reboot: ... which takes this long.
    queue: mean wait in the queue, exponentially distributed.
    limit: on a job's time; then it saves, leaves and queues again.
    price: of a node-hour.
    """

    repair: float = DAY
    soft: float = 0.5
    reboot: float = 600.0
    queue: float = 600.0
    limit: float = math.inf
    price: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """A campaign: see the parts.

    seconds: how long it has its nodes, waits in the queue included.
    """

    machine: Machine
    seconds: float
    hazards: Hazards = Hazards()
    saves: Saves = Saves()
    stack: Stack = Stack()
    site: Site = Site()

    @property
    def failure_rate(self) -> float:
        """Failures of anything, a second, with all nodes there."""
        total = self.machine.nodes + self.machine.spares
        racks = math.ceil(total / self.machine.rack)
        hazards = self.hazards
        return total / hazards.node + racks / hazards.rack + 1 / hazards.job

    @property
    def at_least(self) -> int:
        """How many nodes have to be there for it to train."""
        machine, stack = self.machine, self.stack
        if stack.short != "shrink" or not stack.in_place:
            return machine.nodes
        return stack.at_least or max(1, machine.nodes // 2)

    def checked(self) -> Scenario:
        """Itself, if it makes sense.

        Raises
        ------
        UsageError: it does not.
        """
        machine, hazards, stack, site = self.machine, self.hazards, self.stack, self.site
        _at_least(1, nodes=machine.nodes, ranks_per_node=machine.ranks_per_node, rack=machine.rack)
        _at_least(1, by=stack.by)
        _at_least(0, spares=machine.spares, at_least=stack.at_least)
        between = (hazards.node, hazards.rack, hazards.job, hazards.slow, hazards.preempted)
        for value in (*between, self.seconds, hazards.shape, site.limit):
            if not value > 0:
                raise UsageError(
                    f"a time between failures, a length or a shape is {value:g}",
                    "all of these are greater than 0",
                )
        tiers = [tier for tier in (self.saves.near, self.saves.file) if tier]
        if any(not tier.interval > 0 for tier in tiers):
            raise UsageError(
                "an interval between checkpoints is not greater than 0",
                "leave the tier away where nothing is to be saved",
            )
        times = [stack.step, stack.detect, stack.adopt, stack.shrink, stack.relaunch, stack.resize]
        times += [
            stack.start,
            stack.end,
            site.repair,
            site.reboot,
            site.queue,
            site.price,
            hazards.slow_for,
        ]
        times += [time for tier in tiers for time in (tier.cost, tier.write, tier.restore)]
        if not all(math.isfinite(time) and time >= 0 for time in times):
            raise UsageError("a time or price is negative or infinite", "give it as 0 or more")
        if not 0 <= site.soft <= 1:
            raise UsageError(f"soft is {site.soft:g}, which is no part", "it is from 0 to 1")
        if not 0 <= stack.waiting < 1:
            raise UsageError(f"waiting is {stack.waiting:g}, which is no part", "it is less than 1")
        if hazards.slowdown < 1:
            raise UsageError(
                f"a slow node is {hazards.slowdown:g} times as slow", "that is 1 or more"
            )
        if not math.isfinite(self.seconds):
            raise UsageError("the campaign has no end", "give its --days")
        if stack.at_least > machine.nodes:
            raise UsageError(
                f"at least {stack.at_least} of {machine.nodes} nodes are to train",
                "at least means these or fewer",
            )
        expected = self.seconds * (self.failure_rate + 1 / hazards.preempted)
        expected += self.seconds * (machine.nodes / hazards.slow + 1 / site.limit)
        if expected > MOST_FAILURES:
            raise UsageError(
                f"some {expected:.1g} failures are to be expected",
                "look at the mean times between failures, and at their units",
            )
        return self


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise UsageError(f"{name} is {value}", f"it is {least} or more")
