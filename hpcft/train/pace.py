"""Where this process's time goes, step by step; written down lap by lap (hpcft.telemetry.laps)."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from hpcft.ckpt.errand import Errand
from hpcft.telemetry import laps
from hpcft.telemetry.laps import Lap, bucket
from hpcft.world.recovery import World

#: Seconds that a lap takes: this part of the time the process has trained, within these bounds.
_PART, _SHORTEST, _LONGEST = 1 / 200, 0.25, 60.0
#: Seconds that the end of the training waits for the last lap to be written.
_LAST_TIME = 2.0


class Pace:
    """Of one process. What it costs a step is a few clock readings.

    Parameters
    ----------
    folder: where laps go; None if nobody wants them.
    lapped: called with every lap when it is over.

    Attributes
    ----------
    computed: seconds that the last step was computed for.
    """

    def __init__(
        self, folder: Path | None, world: World, lapped: Callable[[Lap], None] = lambda lap: None
    ) -> None:
        self._folder = folder
        self._lapped = lapped
        self._world = world
        self._started = time.monotonic()
        self._writing: Errand[None] | None = None
        self._unwritten: list[Lap] = []
        self.computed = 0.0
        self._clear()
        self.begin()

    def _clear(self) -> None:
        self._first = self._last = self._missed = self._late = 0
        self._compute = self._waiting = self._saving = 0.0
        self._buckets: Counter[int] = Counter()
        self._metrics: Mapping[str, float] = {}

    def begin(self) -> None:
        """A step begins, or begins anew."""
        self._began, self._waited = time.monotonic(), self._world.progress.waited

    def committed(self, step: int, metrics: Mapping[str, float]) -> None:
        """The step that began last is completed; what follows belongs to its end."""
        now = self._computed()
        if not self._last:
            self._lap_began = time.time() - (now - self._began)
            self._lap_epoch = self._world.membership.epoch
            self._first, self._last = step, step - 1
        self._missed += step - self._last - 1
        self._last = step
        self._metrics = metrics
        self._committed = now

    def late(self) -> None:
        """Others have made the step that began last, without this process."""
        self._computed()
        self._late += 1

    def _computed(self) -> float:
        """Note what the step that began last has taken until now, by a monotonic clock."""
        now = time.monotonic()
        waited = self._world.progress.waited - self._waited
        compute = max(now - self._began - waited, 0.0)
        self._compute += compute
        self._waiting += waited
        self._buckets[bucket(compute)] += 1
        self.computed = compute
        return now

    def ended(self) -> None:
        """And its end is over as well."""
        now = time.monotonic()
        self._saving += now - self._committed
        length = min(max((now - self._started) * _PART, _SHORTEST), _LONGEST)
        if time.time() - self._lap_began >= length:
            self.lap()

    def lap(self) -> None:
        """A lap is over, for it has been long enough or another membership begins."""
        logical = self._world.logical
        if self._last and self._folder and logical is not None:
            lap = Lap(
                self._world.world,
                logical,
                self._lap_epoch,
                self._first,
                self._last,
                self._lap_began,
                time.time(),
                self._compute,
                self._waiting,
                self._saving,
                dict(self._buckets),
                numbers(self._metrics),
                self._missed,
                self._late,
            )
            self._unwritten.append(lap)
            self._lapped(lap)
        self._clear()
        self._write()

    def close(self) -> None:
        """Training is over."""
        self.lap()
        with contextlib.suppress(TimeoutError, OSError):
            if self._writing:
                self._writing.result(_LAST_TIME)
            self._write()
            if self._writing:
                self._writing.result(_LAST_TIME)

    def _write(self) -> None:
        """Have a thread write; where the file system hangs it is that which waits."""
        folder = self._folder
        if (
            folder is None
            or not self._unwritten
            or not (self._writing is None or self._writing.done)
        ):
            return
        unwritten, self._unwritten = self._unwritten, []
        # On a full disk they are lost, and training is not.
        self._writing = Errand(lambda: laps.append(folder, unwritten))


def numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of a script's metrics that are numbers."""
    found = {}
    for name, value in metrics.items():
        with contextlib.suppress(TypeError, ValueError):
            found[name] = float(value)
    return found
