"""How often a tier saves if the user leaves that to the run (``--ckpt-every auto``).

Every rank measures what saves cost; rank 0 decides, with what it has measured itself, when a save
begins, and tells the others the step of the next as it does for any that goes by time.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcft.ckpt import interval
from hpcft.ckpt.history import Habit, History
from hpcft.ckpt.near import Tier
from hpcft.ckpt.policy import Policy

#: Steps without a save, and saves, by which costs are known: medians, for scripts do other things
#: now and then, such as to evaluate the model.
_QUIET_STEPS = 256
_SAVES = 5

#: Told what has happened: kind, step, detail.
Report = Callable[[str, int, dict[str, Any]], None]

#: The tier of the files; those near the ranks are called after their number.
FILES = "files"


class Meter:
    """What the saves of a tier cost training, by this rank's clock.

    That is what the edges of steps take while one is under way, what the optimizer waits for
    copies, and how much slower the steps are in between.
    """

    def __init__(self) -> None:
        self._quiet: deque[float] = deque(maxlen=_QUIET_STEPS)
        self._found: deque[tuple[float, float]] = deque(maxlen=_SAVES)
        self.restart()

    def restart(self) -> None:
        """What follows is measured by itself: ranks have changed, or a save was no ordinary one."""
        self._left: float | None = None
        self._begun: float | None = None
        self._busy: list[float] = []
        self._held_up = self._waited = self._copied = 0.0

    def copied(self, seconds: float) -> None:
        """The optimizer has waited for the state to be copied."""
        self._copied += seconds

    def spared(self, seconds: float) -> None:
        """Somebody else has saved, and has taken so long: that costs training nothing."""
        self._found.append((0.0, seconds))

    def edge(self, began: float, before: object | None, after: object | None) -> None:
        """A step's edge is over.

        Parameters
        ----------
        began: when it began, on the monotonic clock.
        before, after: the save that was, and that is, under way.
        """
        now = time.monotonic()
        if self._left is not None:
            length = began - self._left - self._copied
            (self._quiet if before is None else self._busy).append(length)
        if before is not None:
            self._waited += self._copied
        if before is not None or after is not None:
            self._held_up += now - began
        if after is not before:
            if self._begun is not None:
                self._found.append((self._cost(), now - self._begun))
            # What this edge has done belongs to the one that begins.
            self._busy, self._waited = [], 0.0
            self._held_up = now - began if after is not None else 0.0
            self._begun = began if after is not None else None
        self._left, self._copied = now, 0.0

    def _cost(self) -> float:
        slower = 0.0
        if self._quiet and self._busy:
            slower = statistics.median(self._busy) - statistics.median(self._quiet)
        # What edges take for slower ranks the steps have less to wait for.
        return self._waited + max(0.0, self._held_up + len(self._busy) * slower)

    @property
    def found(self) -> tuple[float, float] | None:
        """What a save costs, and what it takes from begin to end, in seconds; None if not known."""
        if not self._found:
            return None
        costs, drains = zip(*self._found, strict=True)
        return statistics.median(costs), statistics.median(drains)


class Past:
    """The history of a directory of checkpoints, as the present rank 0 continues it.

    Parameters
    ----------
    directory: where it is.
    nodes: how many train.
    """

    def __init__(self, directory: Path, nodes: Callable[[], int]) -> None:
        self.nodes = nodes
        self._directory = directory
        self._history: History | None = None
        self._since: float | None = None
        self._writing = threading.Lock()

    @property
    def history(self) -> History:
        """Brought up to now; an empty one if none could be read yet."""
        if self._history is None:
            return History()
        now = time.monotonic()
        if self._since is not None:
            self._history.node_seconds += (now - self._since) * self.nodes()
            self._since = now
        return self._history

    def read(self) -> None:
        """Have it, if not before.

        Raises
        ------
        OSError: it cannot be read.
        """
        if self._history is None:
            self._history = History.read(self._directory)

    def restored(self, tier: str) -> None:
        """Training goes on from a checkpoint of a tier."""
        if self._history is not None:
            self._history.restored(tier)

    def trains(self) -> None:
        """Training goes on from here.

        Raises
        ------
        OSError: that cannot be read or written down.
        """
        self.read()
        self.history.running = True
        self._since = time.monotonic()
        self.write()

    def ends(self) -> None:
        """The last step is saved, and nothing would be lost.

        Raises
        ------
        OSError: that cannot be written down.
        """
        self.history.running = False
        self._since = None
        self.write()

    def write(self) -> None:
        """Write it down.

        Raises
        ------
        OSError: it cannot be written.
        """
        with self._writing:
            if self._history is not None:
                self.history.write(self._directory)


class Rhythm:
    """How often one tier saves.

    Parameters
    ----------
    tier: its name in the history.
    first: seconds between saves as long as nothing is known of their cost.
    longest: seconds between them at most.
    past: what has been so far.
    report: told when the interval changes notably: kind, step, detail.

    Attributes
    ----------
    nearer: in how many ways a failure is healed without this tier.
    meter: measures.
    """

    def __init__(
        self,
        tier: str,
        first: float,
        longest: float,
        past: Past,
        report: Report,
    ) -> None:
        self.meter = Meter()
        self.nearer = 0
        self._tier = tier
        self._first = first
        self._longest = longest
        self._past = past
        self._report = report

    @classmethod
    def of(cls, name: str, tier: Tier | Policy, past: Past, report: Report) -> Rhythm | None:
        """That of a tier whose interval is found out in the run; None if the user has said it."""
        if tier.longest is None:
            return None
        return cls(name, tier.every, tier.longest, past, report)

    def every(self, step: int) -> float:
        """Seconds to the next save; in rank 0."""
        history = self._past.history
        known = history.habits.get(self._tier)
        measured = self.meter.found or (known and (known.cost, known.drain))
        if not measured:
            return self._first
        cost, drain = measured
        failures, nodes = history.restores.get(self._tier, 0), self._past.nodes()
        mtbf = 1 / (nodes * interval.rate(failures, history.node_seconds, self.nearer))
        best = interval.best(cost, drain, mtbf, self._longest)
        before = known.every if known else self._first
        changes = interval.notable(before, best.seconds)
        habit = Habit(cost, drain, best.seconds if changes else before)
        # In one go, for the thread that commits may be writing it down.
        history.habits = {**history.habits, self._tier: habit}
        if changes:
            seen = (failures, history.node_seconds / 3600, nodes)
            self._tell(step, habit, before, mtbf, best.bound, seen)
        return habit.every

    def _tell(
        self,
        step: int,
        habit: Habit,
        before: float,
        mtbf: float,
        bound: str,
        seen: tuple[int, float, int],
    ) -> None:
        failures, node_hours, nodes = seen
        near = "" if self._tier == FILES else " near the ranks"
        why = (
            f"from here on a checkpoint{near} every {_time(habit.every)} (before {_time(before)}): "
            f"one costs training {habit.cost:.3g} s, and a failure that needs one is expected "
            f"every {_time(mtbf)} ({failures} so far, in {node_hours:.3g} node-hours)"
        )
        detail = {
            "tier": self._tier,
            "every_s": round(habit.every, 3),
            "before_s": round(before, 3),
            "cost_s": round(habit.cost, 6),
            "drain_s": round(habit.drain, 6),
            "mtbf_s": round(mtbf, 3),
            "failures": failures,
            "node_hours": round(node_hours, 6),
            "nodes": nodes,
            "bound": bound,
            "waste": round(interval.waste(habit.every, habit.cost, mtbf), 6),
            "why": f"{why}; {bound}" if bound else why,
        }
        self._report("interval", step, detail)


def _time(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
