"""A host's clock that jumps, and jumps back."""

from __future__ import annotations

import os
import time
from typing import Any

from hpcft.chaos.faults import Fault, Refused, Task

#: A clock that is so near to right was set right by somebody else.
_RIGHT = 1.0


class Clock(Fault):
    """The time of day is another, for all on the host; needs root."""

    def prepare(self, task: Task) -> dict[str, Any]:
        if not task.yes:
            raise Refused("all on this host would have another time of day", "say --yes")
        if os.geteuid():
            raise Refused("only root may set the clock")
        # The time since boot goes on as ever, and says later what the time of day should be.
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        return {"boot": time.time() - now, "jump": task.amount}

    def do(self, how: dict[str, Any]) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + how["jump"])

    def undo(self, how: dict[str, Any]) -> None:
        right = how["boot"] + time.clock_gettime(time.CLOCK_BOOTTIME)
        if abs(time.time() - right) > _RIGHT:
            time.clock_settime(time.CLOCK_REALTIME, right)
