"""Adding a run to the site's history of failures, at its end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hpcft.telemetry import uptime
from hpcft.telemetry.rundir import RunDirectory


def add(rundir: RunDirectory) -> None:
    """Add it, if the environment names a history; that it cannot be written is said, no more."""
    name = os.environ.get(uptime.HISTORY)
    if not name:
        return
    try:
        events = rundir.events()
        if not events:
            return
        times = [event.time for event in events]
        run = rundir.path.name
        found = uptime.stretches(run, events, rundir.ranks(), min(times), max(times))
        uptime.append(Path(name), found)
    except (OSError, ValueError, LookupError, TypeError) as error:
        print(f"hpcft: {uptime.HISTORY} {name}: {error}", file=sys.stderr, flush=True)
