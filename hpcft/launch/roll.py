"""The roll of the nodes while the ranks of a first launch start, and there is no channel yet.

Nobody else would tell of a node that is lost then: Slurm is told not to mind, and knows of it only
minutes later, and MPI's start waits for all. So the first shepherd of each node connects to rank
0's, which it finds by a file in the run directory, and both send beats until there is a channel.

Where the file cannot be written, on a full disk, there is no roll: a start that comes to nothing
then ends when its time is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.launch.channel import LINE_LIMIT, Connection, Refused, authenticate, connect
from hpcft.launch.place import Task
from hpcft.slurm.queue import expand
from hpcft.telemetry.rundir import RunDirectory

#: Seconds between two beats, and of silence after which a node is lost. Nothing is at stake but
#: how long others wait, so that a node may be slow.
_BEAT, _SILENCE = 1.0, 30.0
#: Seconds in which every node must have come, from when rank 0's has; Python may have to be read
#: from a file system that all read it from at the same time.
_COME_TIME = 120.0
#: Seconds between two words on who is still to come.
_WORD_TIME = 15.0
#: Seconds in which a connection is made, or tried again.
_CONNECT_TIME = 5.0


@dataclass
class _Node:
    """One that has answered.

    ranks: how many are on it.
    heard: when it was last heard, by a monotonic clock.
    left: whether it has the channel, and needs the roll no longer.
    """

    host: str
    ranks: int
    connection: Connection
    heard: float = field(default_factory=time.monotonic)
    left: bool = False


class Roll:
    """One shepherd's part in it.

    Parameters
    ----------
    verbose: 1: say that nodes take long to come; 2: say that all are there.
    missed: called when nodes are lost, with their names as far as they are known, and the reason
        in words; in shepherds on other nodes.
    """

    def __init__(
        self,
        task: Task,
        rundir: RunDirectory,
        verbose: int,
        missed: Callable[[frozenset[str], str], None],
    ) -> None:
        self._task = task
        self._rundir = rundir
        self._verbose = verbose
        self._missed = missed
        #: In rank 0's shepherd: the nodes that have answered.
        self._nodes: list[_Node] = []
        self._caller: Connection | None = None

    async def keep(self) -> None:
        """Call the roll, or answer, until nodes are missed or this is cancelled."""
        if self._task.place.rank == 0:
            await self._call()
        elif self._task.number_here == 0:
            await self._answer()

    async def leave(self) -> None:
        """There is a channel, or this shepherd leaves because it was asked to."""
        connections = [node.connection for node in self._nodes]
        connections += [self._caller] if self._caller else []
        for connection in connections:
            connection.send({"over": True})
        if self._task.place.rank == 0:
            Errand(lambda: self._rundir.clear_roll(self._task.launch))
        await asyncio.gather(*(connection.close() for connection in connections))

    # -- rank 0's shepherd -----------------------------------------------------------------------

    async def _call(self) -> None:
        secret = secrets.token_bytes(32)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(Refused):
                await self._hear(await authenticate(reader, writer, secret, 0, listener=True))

        place = self._task.place
        listening = socket.create_server((place.address, 0), backlog=1024)
        where = {
            "address": place.address,
            "port": listening.getsockname()[1],
            "host": place.host,
            "secret": secret.hex(),
        }
        async with await asyncio.start_server(accept, sock=listening, limit=LINE_LIMIT):
            Errand(lambda: self._rundir.write_roll(self._task.launch, where))
            began = time.monotonic()
            word_at = began + _WORD_TIME
            complete = False
            while not self._miss(began):
                await asyncio.sleep(_BEAT)
                for node in self._nodes:
                    node.connection.send({"beat": True})
                if complete:
                    continue
                complete = self._there == place.size
                if complete:
                    self._say(2, "all nodes are there")
                elif time.monotonic() > word_at:
                    self._say(1, f"the nodes of {self._there} of {place.size} ranks are there")
                    word_at += _WORD_TIME

    async def _hear(self, connection: Connection) -> None:
        """Listen to a node until it leaves, or is lost."""
        node: _Node | None = None
        with contextlib.suppress(OSError):
            while (message := await connection.receive()) is not None:
                if node is None:
                    node = _Node(message["host"], message["ranks"], connection)
                    self._nodes.append(node)
                node.heard = time.monotonic()
                node.left = "over" in message
        if node and not node.left:
            self._lost(node.host)

    @property
    def _there(self) -> int:
        """How many ranks are on nodes that have come."""
        return self._task.ranks_here + sum(node.ranks for node in self._nodes)

    def _say(self, least: int, text: str) -> None:
        if self._verbose >= least:
            print(f"hpcft: starting: {text}", file=sys.stderr, flush=True)

    def _miss(self, began: float) -> bool:
        """Whether nodes are missed."""
        now = time.monotonic()
        for node in self._nodes:
            if not node.left and now - node.heard > _SILENCE:
                self._lost(node.host)
                return True
        if self._there < self._task.place.size and now - began > _COME_TIME:
            self._absent()
            return True
        return False

    def _absent(self) -> None:
        """Nodes have not come."""
        there = {node.host for node in self._nodes} | {self._task.place.host}
        # Slurm may not say which these are, as it does not of a heterogeneous step.
        absent = frozenset(expand(self._task.step.hosts) if self._task.step else ()) - there
        names = ", ".join(sorted(absent)) or "some nodes"
        self._missed(absent, f"nothing has started on {names} for {_COME_TIME:g} s")

    # -- the other nodes' ------------------------------------------------------------------------

    async def _answer(self) -> None:
        where = await self._called()
        rank = self._task.place.rank
        secret = bytes.fromhex(where["secret"])
        deadline = time.monotonic() + _COME_TIME
        while True:
            connecting = connect(where["address"], where["port"], secret, rank)
            try:
                self._caller = await asyncio.wait_for(connecting, _CONNECT_TIME)
                break
            except (OSError, asyncio.TimeoutError):
                if time.monotonic() > deadline:
                    self._lost(where["host"])
                    return
                await asyncio.sleep(_BEAT)
        self._caller.send({"host": self._task.place.host, "ranks": self._task.ranks_here})
        beating = asyncio.ensure_future(self._beat(self._caller))
        over = False
        try:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                while message := await asyncio.wait_for(self._caller.receive(), _SILENCE):
                    over = "over" in message
        finally:
            beating.cancel()
        if not over:
            self._lost(where["host"])

    async def _called(self) -> dict[str, Any]:
        """Where rank 0's shepherd listens, as soon as it has said so."""
        while True:
            # In a thread: a file system that hangs must not keep the shepherd.
            looking = Errand(lambda: self._rundir.roll(self._task.launch))
            await looking.answered()
            with contextlib.suppress(OSError, ValueError):
                if where := looking.result():
                    return where
            await asyncio.sleep(_BEAT)

    async def _beat(self, connection: Connection) -> None:
        while True:
            connection.send({"beat": True})
            await asyncio.sleep(_BEAT)

    def _lost(self, host: str) -> None:
        self._missed(frozenset({host}), f"node {host} was lost while the ranks were starting")
