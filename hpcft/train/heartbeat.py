"""How far the run is, written down every second for who looks at it from outside."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Mapping

from hpcft.telemetry.rundir import RunDirectory
from hpcft.world.recovery import World

#: Seconds between two beats.
PERIOD = 1.0
#: Beats over which the rate is told.
_BEATS = 10


class Heartbeat:
    """Keeps ``status.json``, in the process that is logical rank 0.

    Training leaves what it knows here and goes on. A thread writes it, also when no step is
    completed for long; where the file system does not answer it is that thread that waits.
    """

    def __init__(self, rundir: RunDirectory, world: World) -> None:
        self._rundir = rundir
        self._world = world
        self._seen: tuple[int, float, Mapping[str, float]] = 0, 0.0, {}
        self._steps: deque[tuple[float, int]] = deque(maxlen=_BEATS + 1)
        self._thread: threading.Thread | None = None

    def at(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` steps are completed."""
        self._seen = step, time.time(), metrics
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpcft-heartbeat", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            if self._world.logical == 0:
                # A full disk, say: the next may be written again.
                with contextlib.suppress(OSError):
                    self._beat()
            time.sleep(PERIOD)

    def _beat(self) -> None:
        step, stepped, metrics = self._seen
        now = time.time()
        if self._steps and step < self._steps[-1][1]:
            # The run has gone back to a checkpoint.
            self._steps.clear()
        self._steps.append((now, step))
        began, first = self._steps[0]
        self._rundir.write_status(
            {
                "time": now,
                "step": step,
                "stepped": stepped,
                "rate": (step - first) / (now - began) if now > began else None,
                "epoch": self._world.membership.epoch,
                "metrics": {name: _number(value) for name, value in metrics.items()},
                "metrics_url": self._metrics_url(),
            }
        )

    def _metrics_url(self) -> str | None:
        with contextlib.suppress(ValueError, LookupError, OSError):
            return self._rundir.metrics_url()
        return None


def _number(value: float) -> float | None:
    """None for what JSON cannot say."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
