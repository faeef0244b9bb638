"""``python -m hpcft.join RUN_DIR PARTY N``: a process that becomes a rank of a run under way.

`hpcft join` starts it, itself or through srun, once for each rank that is to join; they are N, and
PARTY is a name for all of them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpcft.launch.door import Door
from hpcft.launch.guest import visit
from hpcft.launch.keeper import Keeper
from hpcft.launch.options import Sizes, parse
from hpcft.launch.place import guest_task
from hpcft.run import keep, reported
from hpcft.telemetry.rundir import RunDirectory


def main(argv: list[str] | None = None) -> int:
    """Join the run whose directory is named.

    Returns
    -------
    The run's exit code, or 0 if this process has left before.
    """
    path, party, count = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return reported(partial(_join, RunDirectory(Path(path)), party, int(count)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _join(rundir: RunDirectory, party: str, count: int) -> int:
    task = guest_task()
    door = asyncio.run(_look(rundir))
    os.chdir(door.cwd)
    here = sum(peer.host == task.place.host for peer in door.peers)
    # The run's own are before all that have joined.
    another = task.place.job != door.peers[0].job
    task = replace(task, number_here=here, ranks_here=here + 1, of_another_job=another)
    return keep(
        parse([*door.argv]), task, Sizes(*door.sizes), partial(Keeper.join, party=party, of=count)
    )


async def _look(rundir: RunDirectory) -> Door:
    guest, door = await visit(rundir)
    await guest.leave()
    return door


if __name__ == "__main__":
    sys.exit(main())
