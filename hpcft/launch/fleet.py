"""All shepherds of a run together: what one knows, all know.

The shepherd with the lowest rank of a node leads it. The others of the node connect to their leader
through a Unix socket, the leaders to each other through TCP::

    node 0            node 1            node 2
    leader ---------- leader ---------- leader      (all leaders with all)
     |  |              |  |              |  |
     s  s              s  s              s  s

The death of a leader is the loss of its node. On a single node, where that would be the loss of
all, every shepherd is connected to every other, and nobody depends on the leader.

Facts (a rank is dead, a rank is done, the run is over) are flooded: who learns a new one passes it
on to every connection but the one it came from. Facts only accumulate, or replace their like of a
lower serial number, so order and repetition do not matter::

    suspect L  a leader: it suspects node L, whose leader is L
    lost       a node's leader: the node is dead or cut off; its ranks are dead with it
    gone       a rank: its shepherd is dead, and the rank with it
    dead       a rank: its process is dead, or will be before it can speak again
    cause      a rank: why it died, which can become known a little later
    done       a rank: it ended as agreed
    leave      the run is to end, in order; of no rank in particular
    resize     all ranks are to leave, and others to be launched; of no rank in particular
    at P E     a rank: it was asked to leave for purpose P, and this is how far it is, in epoch E
    guest      a guest, by a number of its own: it would be a rank of the next launch, with others
    parted     a guest: it is gone
    retire     a rank: it is not to be of the next launch
    stuck N    a rank: it waits in a collective and nothing has moved for long, for the Nth time
    slow       a rank: it is slower than the others, or no longer; renewed
    probed     a rank that was slow, a spare now: how long a step takes it; renewed
    replace E  in epoch E the ranks that are slow are to step down; of no rank in particular
    over       a rank: the ranks cannot go on, but might be started again
    end        a rank: it wants the whole run to end now
    bye        a shepherd: it knows that all is over and is about to leave

Notes are for the moment: they are not kept, and go to one shepherd, or once to all: to one's
leader, from there to the other leaders, and from these to their nodes. One that is lost is soon
replaced, or whoever waits for it learns of a failure::

    ready      a rank: it has its gradients for a step
    completed  a rank: it has done all its steps
    cohort     what is settled about a step (hpcft.launch.cohorts)
    pace       a rank: how long its steps take it, of late (hpcft.launch.stragglers)

Leaders exchange beats, and judge silence with :mod:`hpcft.launch.quorum`.

A guest (:mod:`hpcft.launch.guest`) is connected to any one shepherd, and shares the facts with all.

With n nodes there are n (n - 1) / 2 connections and each leader sends n - 1 beats a period: meant
for hundreds of nodes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict

from hpcft.launch.cause import Death
from hpcft.launch.channel import (
    LINE_LIMIT,
    Connection,
    Message,
    Refused,
    authenticate,
    connect,
)
from hpcft.launch.company import GUESTS, Company, Peer
from hpcft.launch.place import Place
from hpcft.launch.quorum import Quorum


class Listener:
    """The sockets a shepherd listens at, open before the run's secret is known.

    Connections that come before :meth:`Fleet.join` wait in the kernel's queue.

    Parameters
    ----------
    address: the address of this host that the other nodes reach it by.
    """

    def __init__(self, address: str) -> None:
        self.tcp, self.courier = _listening(address), _listening(address)
        self.name = f"hpcft-{os.getpid()}-{os.urandom(4).hex()}"
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.unix.bind("\0" + self.name)
        self.unix.listen(1024)

    def peer(self, place: Place) -> Peer:
        """The line in the table of the shepherd at this place."""
        address, port = self.tcp.getsockname()
        courier = self.courier.getsockname()[1]
        return Peer(
            place.rank, place.node, place.host, address, port, courier, self.name, place.job
        )


def _listening(address: str) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.bind((address, 0))
    listening.listen(1024)
    return listening


class Fleet(Company):
    """This shepherd's place among the others.

    Parameters
    ----------
    rank: this shepherd's rank.
    peers: the table of all shepherds, this one included.
    timeout: seconds of silence after which a node is declared dead.
    on_fact: called with every fact that is new, own ones included.
    on_note: called with every note for this shepherd, or for all.
    on_hold: called with True when this node's ranks must not run now, False when they may again.
    on_fenced: called once, when the others go on without this node.
    """

    def __init__(
        self,
        rank: int,
        peers: list[Peer],
        timeout: float,
        on_fact: Callable[[Message], None],
        on_note: Callable[[Message], None],
        on_hold: Callable[[bool], None],
        on_fenced: Callable[[str], None],
    ) -> None:
        super().__init__(rank, peers, on_fact)
        self._leader = next(leader for leader, ranks in self._nodes.items() if rank in ranks)
        self._on_note = on_note
        self._on_hold = on_hold
        self._on_fenced = on_fenced
        self._timeout = timeout
        self._connections: dict[int, Connection] = {}
        self._clock_of: dict[int, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._arrived = asyncio.Event()
        self._quorum: Quorum | None = None
        #: leader -> the first suspicion of it
        self._suspicions: dict[int, Message] = {}
        self._holding = False

    @property
    def _leads(self) -> bool:
        return self.rank == self._leader

    @property
    def _alone(self) -> bool:
        """Whether this node is the only one."""
        return len(self._nodes) == 1

    @property
    def speaks(self) -> bool:
        """Whether this shepherd does what one is to do for all."""
        return self.rank == min(self.standing() - self.retiring(), default=-1)

    def _expected(self) -> set[int]:
        """The ranks whose shepherds this one is connected to."""
        if self._alone:
            return set(self._peers) - {self.rank}
        if not self._leads:
            return {self._leader}
        return (set(self._nodes) | set(self._nodes[self.rank])) - {self.rank}

    async def join(self, listener: Listener, secret: bytes) -> None:
        """Connect to everybody this shepherd is to be connected to, and start judging silence.

        Raises
        ------
        OSError: another shepherd cannot be reached.
        """

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                connection = await authenticate(reader, writer, secret, self.rank, listener=True)
            except Refused:
                return
            self._adopt(connection)

        for sock in (listener.tcp, listener.unix):
            start = asyncio.start_server if sock is listener.tcp else asyncio.start_unix_server
            self._servers.append(await start(accept, sock=sock, limit=LINE_LIMIT))
        for other in sorted(self._expected()):
            if other < self.rank:
                peer = self._peers[other]
                here = peer.node == self._peers[self.rank].node
                where = (peer.local, 0) if here else (peer.address, peer.port)
                self._adopt(await connect(*where, secret, self.rank))
        while not self._expected() <= self._connections.keys():
            self._arrived.clear()
            await self._arrived.wait()
        if self._leads:
            weights = {leader: len(ranks) for leader, ranks in self._nodes.items()}
            now = time.monotonic()
            self._quorum = Quorum(self.rank, weights, self._timeout, 0.7 * self._timeout, now)
            self._spawn(self._beat())

    def announce_death(self, death: Death) -> None:
        """Let everybody know that a rank is dead, and why."""
        self.announce("dead", **asdict(death))
        self.announce("cause", **asdict(death))

    def announce_end(self, rank: int, at: float) -> None:
        """Let everybody know that a rank is dead; why will be announced with its death."""
        self.announce("dead", **asdict(Death(rank, "", at)))

    def settler(self, active: set[int]) -> int:
        """The rank of the shepherd that settles for all what ranks wait for in each step.

        Without it one of those that train is dead, and others are going to.
        """
        first = min(active)
        if self._alone:
            return first
        return next(leader for leader, ranks in self._nodes.items() if first in ranks)

    def note(self, to: int, **detail: object) -> None:
        """Tell one shepherd something for the moment."""
        self._pass_on({"to": to, **detail}, self.rank)

    def proclaim(self, **detail: object) -> None:
        """Tell all shepherds something for the moment, this one included."""
        self._pass_on({"to": None, **detail}, self.rank)

    def _pass_on(self, note: Message, origin: int) -> None:
        """Take a note that has come from ``origin``, or see that it gets where it is to go."""
        to = note["to"]
        if to in (None, self.rank):
            self._on_note(note)
        for peer in self._next(to, origin):
            if connection := self._connections.get(peer):
                connection.send(note)

    def _next(self, to: int | None, origin: int) -> set[int]:
        """To which shepherds a note goes from here."""
        if to is not None:
            return {to if to in self._connections else self._leader} - {self.rank, origin}
        if origin == self.rank:
            return self._expected()
        if self._alone or not self._leads:
            return set()
        # A node has what is for all from its leader, and that from this node's or from the others'.
        own = set(self._nodes[self.rank])
        return (own if origin in self._nodes else own | set(self._nodes)) - {self.rank, origin}

    def here(self) -> set[int]:
        """The ranks of this node whose shepherds are there."""
        return self.standing() & set(self._nodes[self._leader])

    def parity_set(self, active: set[int], size: int) -> list[Peer]:
        """Those that keep parity for each other, this one among them, each on another node.

        Parameters
        ----------
        size: how many there are to be, about.

        Returns
        -------
        In order, the same in all of them; only this one if the others have no rank to match it.
        """
        standing = self.standing() & active
        nodes = [sorted(standing & set(ranks)) for _, ranks in sorted(self._nodes.items())]
        here = next((ranks for ranks in nodes if self.rank in ranks), [self.rank])
        number = here.index(self.rank)
        alike = [ranks[number] for ranks in nodes if len(ranks) > number]
        if self.rank not in alike:
            return [self._peers[self.rank]]
        sets = max(1, min(round(len(alike) / size), len(alike) // 2))
        which = alike.index(self.rank) * sets // len(alike)
        members = [r for i, r in enumerate(alike) if i * sets // len(alike) == which]
        return [self._peers[rank] for rank in members]

    def partner(self, active: set[int], idle_first: bool = False) -> Peer | None:
        """The shepherd that keeps copies for this one: of the next node that trains, if there is
        one, else of the next; None if there is no other node.

        Parameters
        ----------
        idle_first: rather of a node where nobody trains, if there is one; nodes that train take
            turns with these.
        """
        standing = self.standing()
        nodes = {leader: sorted(standing & set(ranks)) for leader, ranks in self._nodes.items()}
        others = [leader for leader, ranks in nodes.items() if ranks and leader != self._leader]
        training = sorted(leader for leader in nodes if active & set(nodes[leader]))
        idle = sorted(set(others) - set(training))
        here = self._nodes[self._leader].index(self.rank)
        if idle_first and idle and self._leader in training:
            after = idle[training.index(self._leader) % len(idle)]
            # Those of several nodes that come to the same one begin with different ranks there.
            here += training.index(self._leader) // len(idle)
        else:
            ring = [leader for leader in training if leader != self._leader] or sorted(others)
            if not ring:
                return None
            after = next((leader for leader in ring if leader > self._leader), ring[0])
        return self._peers[nodes[after][here % len(nodes[after])]]

    async def leave(self) -> None:
        """Close all connections, after a last chance for the others to say they know all."""
        self.announce("bye", self.rank)
        deadline = time.monotonic() + self._timeout
        while time.monotonic() < deadline:
            # Of a rank that is dead, its shepherd may still have to say why.
            if self._peers.keys() <= self.known("bye") | self.known("cause"):
                break
            await asyncio.sleep(0.005)
        for task in self._tasks:
            task.cancel()
        for server in self._servers:
            server.close()
        await asyncio.gather(*(c.close() for c in self._connections.values()))

    def _fence(self, reason: str) -> None:
        first, self.fenced = not self.fenced, True
        if first:
            self._on_fenced(reason)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _adopt(self, connection: Connection) -> None:
        if connection.peer >= GUESTS:
            for fact in self.facts():
                connection.send(fact)
        elif connection.peer not in self._expected():
            return
        self._connections[connection.peer] = connection
        self._arrived.set()
        self._spawn(self._read(connection))

    async def _read(self, connection: Connection) -> None:
        peer = connection.peer
        certain = True
        try:
            while (message := await connection.receive()) is not None:
                if "beat" in message:
                    self._clock_of[peer] = message["beat"]
                    if self._quorum:
                        self._quorum.heard(peer, time.monotonic(), message["echo"])
                elif "to" in message:
                    self._pass_on(message, peer)
                elif "hold" in message or "fence" in message:
                    self._obey(message)
                else:
                    self._learn(message, connection)
        except OSError:
            certain = False
        self._closed(peer, certain)

    def _closed(self, peer: int, certain: bool) -> None:
        # Who is missing from "bye" did not leave by agreement.
        if peer in self.known("bye") or self.known("end"):
            return
        if peer >= GUESTS:
            self.announce("parted", peer)
            return
        if not self._leads and not self._alone:
            self._fence("the leading shepherd of this node is gone")
        elif peer in self._nodes and not self._alone:
            if certain:
                self._declare(peer, f"node {self._peers[peer].host} lost", time.time())
        else:
            self.announce("gone", peer)
            self.announce_death(Death(peer, "its shepherd died", time.time()))

    def _declare(self, leader: int, cause: str, at: float) -> None:
        """A node is lost, and all its ranks with it, whether they are still running or not."""
        self.announce("lost", leader)
        for rank in self._nodes[leader]:
            if rank not in self.known("done"):
                self.announce_death(Death(rank, cause, at))

    def _learn(self, fact: Message, origin: Connection | None) -> None:
        if not self._note(fact):
            return
        for connection in self._connections.values():
            if connection is not origin:
                connection.send(fact)
        if fact["fact"] == "lost":
            if self._quorum:
                self._quorum.lost(fact["rank"])
            if fact["rank"] == self._leader:
                self._fence("the others go on without this node")
        elif fact["fact"].startswith("suspect"):
            self._learn_suspicion(fact)
        self.on_fact(fact)

    def _suspect(self, detail: Message) -> None:
        self.announce(f"suspect {detail['leader']}", self.rank, **detail)

    def _learn_suspicion(self, fact: Message) -> None:
        leader = fact["leader"]
        self._suspicions.setdefault(leader, fact)
        if leader == self._leader:
            self._fence("the others have not heard this node")
        if not self._quorum:
            return
        new = leader not in self._quorum.suspects
        self._quorum.told(fact["rank"], {leader})
        if new:
            self._suspect({name: fact[name] for name in ("leader", "silence", "at")})
        for gone in sorted(self._quorum.decided()):
            first = self._suspicions[gone]
            host = self._peers[gone].host
            self._declare(gone, f"node {host} silent for {first['silence']:.2f} s", first["at"])

    async def _beat(self) -> None:
        period = self._timeout / 10
        while True:
            assert self._quorum is not None
            now = time.monotonic()
            for leader in self._nodes:
                if connection := self._connections.get(leader):
                    echo = self._clock_of.get(leader) if self._quorum.answers(leader) else None
                    connection.send({"beat": now, "echo": echo})
            await asyncio.sleep(period)
            self._judge()

    def _judge(self) -> None:
        assert self._quorum is not None
        verdict = self._quorum.tick(time.monotonic())
        details = {
            leader: {"leader": leader, "silence": silence, "at": time.time() - silence}
            for leader, silence in verdict.suspected.items()
        }
        # All known before the first is announced, for a decision is on all.
        self._suspicions |= details
        for detail in details.values():
            self._suspect(detail)
        if verdict.fenced:
            self._order({"fence": "this node is cut off from the majority"})
        if verdict.hold != self._holding:
            self._holding = verdict.hold
            self._order({"hold": verdict.hold})

    def _order(self, message: Message) -> None:
        """Have all ranks of this node held, let go or killed."""
        self._obey(message)
        for rank in self._nodes[self.rank]:
            if connection := self._connections.get(rank):
                connection.send(message)

    def _obey(self, message: Message) -> None:
        if "hold" in message:
            self._on_hold(message["hold"])
        else:
            self._fence(message["fence"])
