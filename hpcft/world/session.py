"""This process's place in the running world, for the training job to find."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpi4py import MPI

from hpcft.errors import HpcftError
from hpcft.telemetry.events import Echo
from hpcft.telemetry.rundir import RunDirectory
from hpcft.world.journal import Journal
from hpcft.world.link import Link
from hpcft.world.membership import Policy
from hpcft.world.mode import Mode
from hpcft.world.notify import Notifier
from hpcft.world.recovery import World


@dataclass(frozen=True)
class Session:
    """Everything a training job needs to know of the world it runs in.

    options: what the launcher was told: run_dir, verbose, warm, digest, terminal, checkpoints,
        tensorboard.
    key: the same in all processes, and in no other run.
    mode: how the ranks work together.
    listener: where other ranks call this process, if they do; and where all listen, by world rank.
    """

    world: World
    journal: Journal | None
    options: dict[str, Any]
    key: str = ""
    mode: Mode = field(default_factory=Mode)
    listener: socket.socket | None = None
    addresses: dict[int, tuple[str, int]] = field(default_factory=dict)


_current: Session | None = None


def current() -> Session:
    """The world of this process; a world of what MPI has started if it has no shepherd."""
    global _current
    if _current is None:
        _current = _without_shepherd()
    return _current


def _without_shepherd() -> Session:
    if not MPI.Is_initialized():
        raise HpcftError(
            "hpcft.init() is called before MPI is started, as in a module for --preload",
            "call it in the script itself",
        )
    comm = MPI.COMM_WORLD
    hosts = dict(enumerate(comm.allgather(socket.gethostname())))
    world = World(comm, None, hosts, 0, Policy(substitute=False, shrink=False))
    options = {"verbose": 1, "warm": False, "digest": False, "terminal": False}
    return Session(world, None, options | {"initial": None, "checkpoints": None, "spares_do": ()})


def meet(link: Link) -> None:
    """Exchange the shepherds' addresses, and make the world."""
    global _current
    options = json.loads(os.environ["HPCFT_RUN"])
    comm = MPI.COMM_WORLD
    notifier = Notifier()
    link.send("hello", rank=comm.rank, size=comm.size)
    peers = comm.allgather(link.receive()["peer"])
    secret, key = comm.bcast((secrets.token_hex(32), secrets.token_hex(8)))
    pids = dict(enumerate(comm.allgather(os.getpid())))
    link.send("table", peers=peers, secret=secret)
    link.await_ready()
    link.listen(notifier.failed)
    hosts = {peer["rank"]: peer["host"] for peer in peers}
    policy = Policy(
        "substitute" in options["on_failure"],
        "shrink" in options["on_failure"],
        options["min_ranks"],
    )
    world = World(comm, link, hosts, options["spares"], policy)
    echo = Echo(options["terminal"]) if options["verbose"] >= 2 else None
    rundir = RunDirectory(Path(options["run_dir"]), echo)
    mode = Mode(**options["mode"])
    listener: socket.socket | None = None
    addresses: dict[int, tuple[str, int]] = {}
    if mode.name == "async":
        mine = peers[comm.rank]["address"]
        # More wait here for their turn than there are ranks.
        listener = socket.create_server((mine, 0), backlog=comm.size)
        addresses = dict(enumerate(comm.allgather((mine, listener.getsockname()[1]))))
    comm.Barrier()
    link.send("met")
    journal = Journal(rundir, world, pids, options["restarts"])
    _current = Session(world, journal, options, key, mode, listener, addresses)
