"""Connections between all ranks that train, over which each sends what its steps change.

Of every pair the one with the higher world rank dials, and dials again as long as the connection
is wanted and not there. A connection has two threads in each process. What they do with large
memory (sockets, numpy) leaves Python's lock to the thread that trains.

Nobody waits for a peer that is slow to receive: what it has not been sent yet adds up to one
update, and a vector a peer is all the memory that takes; as long as it keeps up it shares that of
all others. What comes in adds up, too, in one vector, until the thread that trains takes it.

Who joins asks any one peer for the state. Each update says which of its sender's steps it is of,
``lo`` to ``hi``, and the state, up to which step of whom it has the updates: so the newcomer
neither misses one nor has it twice. (One that is of several steps, and in the state in part, counts
for the rest of its steps.)
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcft.train.line import PATIENCE, Kind, Line

Vector = npt.NDArray[np.floating[Any]]

#: Seconds between two attempts to reach a peer.
_REDIAL = 0.05
#: Seconds between two looks whether this process still takes calls.
_LOOK = 0.2
#: A step, where there is none.
_NONE = -1


@dataclass(frozen=True)
class Snapshot:
    """The state of one rank, for another that joins.

    package: what goes before, of the giver's making.
    memories: bytes, flat; sent as they are when they are sent.
    included: by world rank, the step up to which its updates are in the state.
    """

    package: bytes
    memories: list[npt.NDArray[np.uint8]]
    included: Mapping[int, int]


@dataclass
class _Update:
    """Of the steps after ``lo`` up to ``hi``."""

    lo: int
    hi: int
    vector: Vector

    def join(self, other: _Update) -> _Update:
        """This one and the one that follows it."""
        # Not in place, for others may share it.
        return _Update(self.lo, other.hi, self.vector + other.vector)


@dataclass
class _Peer:
    """A connection.

    step: the last that it is known to have completed.
    since: its step when it took us in: what it sends is of those that follow.
    work: notified when there is something to send.
    """

    world: int
    line: Line
    work: threading.Condition
    step: int = _NONE
    since: int = _NONE
    pending: _Update | None = None
    done: int | None = None
    wishes: list[tuple[Kind, int, bytes]] = field(default_factory=list)
    snapshot: Snapshot | None = None


class Mesh:
    """This process's connections. Its methods are for the thread that trains.

    Parameters
    ----------
    world: this process's world rank.
    listener: where others call.
    addresses: where all others listen, by world rank.
    key: proves to others that this process is of the same run.
    size, dtype: of the vector of an update.
    """

    def __init__(
        self,
        world: int,
        listener: socket.socket,
        addresses: Mapping[int, tuple[str, int]],
        key: str,
        size: int,
        dtype: npt.DTypeLike,
    ) -> None:
        self._world = world
        self._listener = listener
        self._addresses = addresses
        self._key = key.encode()
        self._size = size
        self._dtype = np.dtype(dtype)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._peers: dict[int, _Peer] = {}
        self._wanted: frozenset[int] = frozenset()
        self._dead: set[int] = set()
        self._dialling: set[int] = set()
        self._step = _NONE
        #: What :meth:`finish` was called with, and will be.
        self._done: int | None = None
        self._mark = 0
        self._their_done: dict[int, int] = {}
        self._inbox = np.zeros(size, self._dtype)
        self._spare_inbox = np.zeros(size, self._dtype)
        self._something = False
        #: By world rank, the step up to which its updates have come in, and have been taken.
        self._received: dict[int, int] = {}
        self._applied: dict[int, int] = {}
        #: Who asks for the state, with what has to be in it.
        self._asking: dict[int, Mapping[int, int]] = {}
        #: While this process joins, updates have to wait; and whom it has asked for the state.
        self._joining = False
        self._giver: int | None = None
        self._into: Callable[[bytes], list[npt.NDArray[np.uint8]]] | None = None
        self._included: Mapping[int, int] | None = None
        self._closed = False
        threading.Thread(target=self._take_calls, name="hpcft-calls", daemon=True).start()

    # -- who is there --------------------------------------------------------------------------

    def want(self, worlds: Collection[int], dead: Collection[int]) -> None:
        """Be connected to these from now on, and to nobody who is dead."""
        with self._changed:
            self._wanted = frozenset(worlds) - {self._world}
            self._dead.update(dead)
            for world in self._dead & self._peers.keys():
                self._drop(self._peers[world])
            due = {w for w in self._wanted - self._peers.keys() if w < self._world}
            due -= self._dialling
            self._dialling |= due
        for world in due:
            threading.Thread(
                target=self._dial, args=(world,), name="hpcft-dial", daemon=True
            ).start()

    @property
    def complete(self) -> bool:
        """Whether all that are wanted are connected."""
        with self._changed:
            return self._wanted <= self._peers.keys()

    @property
    def slowest(self) -> int | None:
        """The least step that any of those wanted has completed; None if there is nobody."""
        with self._changed:
            # Who has ended is not waited for, nor who is joining.
            steps = [
                peer.step
                for world, peer in self._peers.items()
                if world in self._wanted
                and peer.step != _NONE
                and self._their_done.get(world, _NONE) < self._mark
            ]
            return min(steps, default=None)

    def wait(self, seconds: float) -> None:
        """Until something has changed, or so long."""
        with self._changed:
            self._changed.wait(seconds)

    # -- steps ---------------------------------------------------------------------------------

    def begin(self, step: int, mark: int) -> None:
        """This process trains, from this step on.

        Parameters
        ----------
        mark: what :meth:`finish` will be called with when it has trained to the end; the same in
            all, and more each time.
        """
        with self._changed:
            self._step, self._mark, self._done = step, mark, None
            for peer in self._peers.values():
                peer.wishes.append((Kind.BEGUN, step, b""))
                peer.work.notify()

    def publish(self, step: int, vector: Vector) -> None:
        """Send everybody what the step that is completed has changed. It must not change later."""
        with self._changed:
            before, self._step = self._step, step
            for peer in self._peers.values():
                self._queue(peer, _Update(before, step, vector))

    def _queue(self, peer: _Peer, update: _Update) -> None:
        peer.pending = peer.pending.join(update) if peer.pending else update
        peer.work.notify()

    def take(self) -> Vector | None:
        """What has come in since the last call, to be used up until the next; None if nothing."""
        with self._changed:
            if not self._something:
                self._applied.update(self._received)
                return None
            taken, self._inbox = self._inbox, self._spare_inbox
            self._spare_inbox = taken
            self._something = False
            self._applied.update(self._received)
            # What was taken before is used up.
            self._inbox.fill(0)
            return taken

    def finish(self, mark: int) -> None:
        """This process has trained to the end."""
        with self._changed:
            self._done = mark
            for peer in self._peers.values():
                peer.done = mark
                peer.work.notify()

    def all_done(self, mark: int) -> bool:
        """Whether all that are wanted have said the same, and all they have sent has come in."""
        with self._changed:
            done = {world for world, said in self._their_done.items() if said >= mark}
            return self._wanted <= done

    # -- joining -------------------------------------------------------------------------------

    def asked(self) -> bool:
        """Whether somebody asks for the state, and all is here that has to be in it."""
        with self._changed:
            return any(self._has(needs) for needs in self._asking.values())

    def _has(self, needs: Mapping[int, int]) -> bool:
        return all(
            self._applied.get(world, _NONE) >= step
            for world, step in needs.items()
            # What is lost with the dead, and what was cut off, is in nobody's state.
            if world in self._peers and world != self._world
        )

    def give(self, snapshot: Callable[[Mapping[int, int]], Snapshot]) -> None:
        """Send the state to those who ask for it. All that :meth:`take` gave is in it.

        Parameters
        ----------
        snapshot: makes it, of the step that was published last, with what it says it includes.
        """
        with self._changed:
            askers = [world for world, needs in self._asking.items() if self._has(needs)]
            included = {**self._applied, self._world: self._step}
        if not askers:
            return
        made = snapshot(included)
        with self._changed:
            for world in askers:
                del self._asking[world]
                if peer := self._peers.get(world):
                    # It is in there.
                    peer.pending = None
                    peer.snapshot = made
                    peer.work.notify()

    def join(self) -> None:
        """This process is without a state: it holds back what comes in until it has one."""
        with self._changed:
            for peer in list(self._peers.values()):
                self._drop(peer)
            self._joining, self._giver, self._included = True, None, None
            self._step, self._done = _NONE, None
            self._inbox.fill(0)
            self._spare_inbox.fill(0)
            self._something = False
            self._received.clear()
            self._applied.clear()
            self._asking.clear()
            self._their_done.clear()

    def ask(self, into: Callable[[bytes], list[npt.NDArray[np.uint8]]]) -> bool:
        """Ask one of those that are connected and have it for the state, unless one is asked.

        Parameters
        ----------
        into: called, in a thread of the connection, with the snapshot's package; returns the
            memory that what follows it goes to.

        Returns
        -------
        False if there is nobody who has it.
        """
        with self._changed:
            if self._giver in self._peers:
                return True
            self._into = into
            having = [w for w, peer in self._peers.items() if peer.since != _NONE]
            self._giver = min(having, default=None)
            if self._giver is None:
                return False
            needs = {w: peer.since for w, peer in self._peers.items() if peer.since != _NONE}
            giver = self._peers[self._giver]
            giver.wishes.append((Kind.ASK, 0, pickle.dumps(needs)))
            giver.work.notify()
            # Those held back look whether it is theirs.
            self._changed.notify_all()
            return True

    @property
    def joined(self) -> bool:
        """Whether the state has arrived."""
        with self._changed:
            return self._included is not None

    def settle(self) -> None:
        """The state that has arrived is this process's own now: let come in what was held back."""
        with self._changed:
            assert self._included is not None
            self._applied.update(self._included)
            self._joining, self._giver = False, None
            self._changed.notify_all()

    def restored(self) -> None:
        """The state has come another way, from a survivor in a recovery."""
        with self._changed:
            self._joining, self._giver, self._included = False, None, None
            self._changed.notify_all()

    def close(self) -> None:
        """Be connected to nobody any more."""
        with self._changed:
            self._closed = True
            self._wanted = frozenset()
            for peer in list(self._peers.values()):
                self._drop(peer)

    # -- connections ---------------------------------------------------------------------------

    def _take_calls(self) -> None:
        self._listener.settimeout(_LOOK)
        while not self._closed:
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            # In a thread: who is slow to say who it is must not keep others waiting.
            threading.Thread(
                target=self._meet, args=(sock, None), name="hpcft-call", daemon=True
            ).start()

    def _dial(self, world: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                sock = socket.create_connection(self._addresses[world], PATIENCE)
                self._meet(sock, world)
            with self._changed:
                wanted = world in self._wanted and world not in self._dead and not self._closed
                if not wanted or world in self._peers:
                    self._dialling.discard(world)
                    return
            time.sleep(_REDIAL)

    def _meet(self, sock: socket.socket, world: int | None) -> None:
        """Get to know who is at the other end, and start talking.

        Parameters
        ----------
        world: who was dialled; None if it has called.
        """
        peer: _Peer | None = None
        line = Line(sock)
        try:
            found = line.greet(self._key, world is not None, self._world)
            with self._changed:
                if found in self._dead or self._closed:
                    raise OSError("not wanted")
                if former := self._peers.get(found):
                    # It has dialled again, for it has lost the connection.
                    self._drop(former)
                peer = _Peer(found, line, threading.Condition(self._lock))
                peer.done = self._done
                self._peers[found] = peer
                self._received.pop(found, None)
                self._applied.pop(found, None)
                since = self._step
            peer.since = line.settle(since)
            with self._changed:
                peer.step = peer.since
                self._received[found] = self._applied[found] = peer.since
                self._changed.notify_all()
        except (OSError, EOFError, ValueError):
            if peer:
                with self._changed:
                    self._drop(peer)
            line.close()
            return
        for work in (self._send, self._read):
            threading.Thread(
                target=self._talk, args=(work, peer), name="hpcft-peer", daemon=True
            ).start()

    def _drop(self, peer: _Peer) -> None:
        """A connection is no good any more."""
        if self._peers.get(peer.world) is peer:
            del self._peers[peer.world]
            self._asking.pop(peer.world, None)
            if self._giver == peer.world:
                self._giver = None
        # Its threads wake up.
        peer.line.shut()
        peer.work.notify()
        self._changed.notify_all()

    def _talk(self, work: Callable[[_Peer], None], peer: _Peer) -> None:
        try:
            work(peer)
        except (OSError, EOFError):
            with self._changed:
                self._drop(peer)

    def _current(self, peer: _Peer) -> bool:
        return self._peers.get(peer.world) is peer

    def _send(self, peer: _Peer) -> None:
        while True:
            with self._changed:
                while not (peer.wishes or peer.snapshot or peer.pending or peer.done is not None):
                    if not self._current(peer):
                        return
                    peer.work.wait()
                if not self._current(peer):
                    return
                snapshot, peer.snapshot = peer.snapshot, None
                wishes, peer.wishes = peer.wishes, []
                update, peer.pending = peer.pending, None
                done, peer.done = peer.done, None
            for kind, number, package in wishes:
                peer.line.send(kind, number, 0, package)
            if snapshot:
                self._send_snapshot(peer.line, snapshot)
            if update:
                peer.line.send(Kind.UPDATE, update.lo, update.hi, update.vector.data)
            if done is not None:
                peer.line.send(Kind.DONE, done)

    def _send_snapshot(self, line: Line, snapshot: Snapshot) -> None:
        line.send(Kind.STATE, body=pickle.dumps((snapshot.package, snapshot.included)))
        for memory in snapshot.memories:
            line.send_raw(memory.data)

    def _read(self, peer: _Peer) -> None:
        room = np.empty(self._size, self._dtype)
        while True:
            kind, first, second, length = peer.line.receive()
            if kind == Kind.UPDATE:
                if length != room.nbytes:
                    raise OSError("an update of another model")
                peer.line.fill(room.data.cast("B"))
                self._arrived(peer, first, second, room)
            elif kind == Kind.BEGUN:
                with self._changed:
                    peer.step = first
                    if peer.since == _NONE:
                        peer.since = first
                        self._received[peer.world] = self._applied[peer.world] = first
                    self._changed.notify_all()
            elif kind == Kind.DONE:
                self._await_joined(peer)
                with self._changed:
                    self._their_done[peer.world] = first
                    self._changed.notify_all()
            elif kind == Kind.ASK:
                needs = pickle.loads(peer.line.fill(bytearray(length)))
                with self._changed:
                    self._asking[peer.world] = needs
                    self._changed.notify_all()
            elif kind == Kind.STATE:
                package, included = pickle.loads(peer.line.fill(bytearray(length)))
                assert self._into is not None
                for memory in self._into(package):
                    peer.line.fill(memory.data)
                with self._changed:
                    self._included = included
                    self._changed.notify_all()
                self._await_joined(peer)

    def _await_joined(self, peer: _Peer) -> bool:
        """Wait while this process joins; False if what has come is in the state it will get."""
        with self._changed:
            while self._joining:
                if not self._current(peer):
                    raise EOFError
                # What comes from the giver before the state is in it.
                if self._giver == peer.world and self._included is None:
                    return False
                self._changed.wait()
        return True

    def _arrived(self, peer: _Peer, lo: int, hi: int, vector: Vector) -> None:
        counts = self._await_joined(peer)
        with self._changed:
            if not self._current(peer):
                raise EOFError
            included = (self._included or {}).get(peer.world, _NONE)
            peer.step = hi
            self._received[peer.world] = hi
            if counts and hi > included:
                if lo < included:
                    vector *= (hi - included) / (hi - lo)
                self._inbox += vector
                self._something = True
            self._changed.notify_all()
