"""``hpcft leave``."""

from __future__ import annotations

import argparse
import asyncio

from hpcft.cli.runs import RUN, add_run
from hpcft.errors import HpcftError, UsageError
from hpcft.launch.door import Door
from hpcft.launch.guest import Guest, visit
from hpcft.telemetry.rundir import RunDirectory
from hpcft.watch.runs import find
from hpcft.world.departure import STAYS

SUMMARY = "take workers out of a training that runs"

DESCRIPTION = f"""\
Take ranks out of a training that runs with --ckpt-dir, in order: at the end of a step all save, and
those that stay go on from there. Spares take the place of ranks that train. What runs on nodes that
Slurm drains leaves by itself.

    hpcft leave RUN --nodes n3,n4        all that runs on these nodes
    hpcft leave RUN --ranks 2            rank 2

{RUN}"""

_EPILOG = """\
exit code: 0 they have left; 1 the ranks could not save, and train on; 2 there is no such run, no
such rank, or too few would be left
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options."""
    parser.epilog = _EPILOG
    add_run(parser)
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--nodes", metavar="LIST", help="names of nodes, separated by commas")
    who.add_argument("--ranks", metavar="LIST", help="ranks, separated by commas")


def run(args: argparse.Namespace) -> int:
    """Do it; return the exit code."""
    rundir = find(args.run_name).rundir
    return asyncio.run(_leave(rundir, args.nodes, args.ranks))


async def _leave(rundir: RunDirectory, nodes: str | None, ranks: str | None) -> int:
    guest, door = await visit(rundir)
    going = _on(guest, nodes) if nodes else _played(rundir, guest, ranks or "")
    left = len(guest.standing() - going)
    if left < max(1, door.min_ranks):
        await guest.leave()
        raise UsageError(
            f"{left} processes would be left, of at least {max(1, door.min_ranks)}",
            "end the run with `hpcft stop`, or let others join first",
        )
    for rank in going:
        guest.announce("retire", rank, reason="hpcft leave")
    # That launch is over when nobody of it is there any more.
    stays = await guest.wait(lambda: bool(guest.known(STAYS)))
    await guest.leave()
    if stays:
        raise HpcftError(
            "nobody leaves, for the ranks could not save: training goes on as before",
            "make room for checkpoints; end the run with `hpcft stop` and start it with fewer",
        )
    now = await _next(rundir, door)
    print(f"{len(going)} left; {now} processes go on")
    return 0


async def _next(rundir: RunDirectory, before: Door) -> int:
    """How many processes the next launch has."""
    # Some of the former may still answer.
    guest, door = await visit(rundir, before)
    await guest.leave()
    return len(door.peers)


def _on(guest: Guest, nodes: str) -> set[int]:
    wanted = {name.strip() for name in nodes.split(",") if name.strip()}
    hosts = {rank: host for rank, host in guest.hosts.items() if rank in guest.standing()}
    if strange := sorted(wanted - set(hosts.values())):
        raise UsageError(
            f"nothing of the run is on {', '.join(strange)}",
            f"it is on {', '.join(sorted(set(hosts.values())))}",
        )
    return {rank for rank, host in hosts.items() if host in wanted}


def _played(rundir: RunDirectory, guest: Guest, ranks: str) -> set[int]:
    played = {entry["logical"]: entry["world"] for entry in rundir.ranks()}
    try:
        wanted = {int(rank) for rank in ranks.split(",")}
    except ValueError:
        raise UsageError(f"--ranks {ranks!r} is no list of ranks", "give some like 2,3") from None
    if strange := sorted(wanted - played.keys()):
        raise UsageError(
            f"there is no rank {', '.join(map(str, strange))}", "see `hpcft ps` for those there are"
        )
    return {played[rank] for rank in wanted} & guest.standing()
