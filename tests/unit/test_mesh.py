"""The mesh of connections, over real sockets, several of them in one process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from training import wait_for

from hpcft.train.mesh import Mesh, Snapshot

SIZE = 5


class Player:
    """A rank: its mesh, and the sum of all updates it has."""

    def __init__(self, world: int, listener: socket.socket, addresses: Mapping[int, Any]) -> None:
        self.world = world
        self.mesh = Mesh(world, listener, addresses, "secret", SIZE, np.float64)
        self.vector = np.zeros(SIZE)
        self.step = 0

    def publish(self) -> None:
        update = np.full(SIZE, 10.0**self.world)
        self.step += 1
        self.vector = self.vector + update
        self.mesh.publish(self.step, update)
        self.absorb()

    def absorb(self) -> None:
        if (arrived := self.mesh.take()) is not None:
            self.vector = self.vector + arrived
        if self.mesh.asked():
            self.mesh.give(self.snapshot)

    def snapshot(self, included: Mapping[int, int]) -> Snapshot:
        return Snapshot(b"", [self.vector.copy().view(np.uint8)], included)

    def join(self, others: list[int], attend: Callable[[], None]) -> None:
        room = np.zeros(SIZE)
        self.mesh.join()
        self.mesh.want(others, ())

        def there() -> bool:
            attend()
            if self.mesh.complete:
                self.mesh.ask(lambda package: [room.view(np.uint8)])
            return self.mesh.joined

        wait_for("the state", there, 20)
        self.vector = room
        self.mesh.settle()
        self.mesh.begin(self.step, 0)


@pytest.fixture
def players() -> Iterator[list[Player]]:
    listeners = {world: socket.create_server(("127.0.0.1", 0)) for world in range(4)}
    addresses = {w: ("127.0.0.1", s.getsockname()[1]) for w, s in listeners.items()}
    made = [Player(world, listeners[world], addresses) for world in listeners]
    yield made
    for player in made:
        player.mesh.close()
        listeners[player.world].close()


def connect(players: list[Player]) -> None:
    worlds = [player.world for player in players]
    for player in players:
        player.mesh.begin(player.step, 0)
        player.mesh.want(worlds, ())
    wait_for("connections", lambda: all(player.mesh.complete for player in players), 20)


def settled(players: list[Player], total: float) -> None:
    """All come to have the same sum."""

    def alike() -> bool:
        for player in players:
            player.absorb()
        return all((player.vector == total).all() for player in players)

    with contextlib.suppress(AssertionError):
        wait_for("the sum", alike, 20)
    assert [player.vector.tolist() for player in players] == [[total] * SIZE] * len(players)


def test_all_get_all_updates(players: list[Player]) -> None:
    connect(players)
    for player in players:
        for _ in range(player.world + 3):
            player.publish()
    settled(players, 3 + 40 + 500 + 6000)
    assert players[3].mesh.slowest == 3
    assert players[0].mesh.slowest == 4


def test_who_joins_amid_updates_misses_none_and_has_none_twice(players: list[Player]) -> None:
    workers, newcomer = players[:3], players[3]
    connect(workers)

    def train() -> None:
        for worker in workers:
            worker.mesh.want(range(4), ())
            worker.publish()

    train()
    newcomer.join([0, 1, 2], train)
    steps = workers[0].step
    for worker in workers:
        worker.publish()
    newcomer.publish()
    settled(players, (steps + 1) * 111 + 1000)


def test_the_giver_dies_and_another_gives(players: list[Player]) -> None:
    workers, newcomer = players[:3], players[3]
    connect(workers)
    for worker in workers:
        worker.publish()
    settled(workers, 111)
    asked = threading.Event()

    def train() -> None:
        # The first that is asked answers nobody any more.
        for worker in workers:
            worker.mesh.want(range(4), ())
        if players[0].mesh.asked() and not asked.is_set():
            asked.set()
            players[0].mesh.close()
            for player in players[1:]:
                player.mesh.want([1, 2, 3], [0])
        for worker in workers[1:]:
            worker.absorb()

    newcomer.join([0, 1, 2], train)
    assert asked.is_set()
    players[1].publish()
    settled(players[1:], 121)


def test_two_join_at_the_same_time(players: list[Player]) -> None:
    connect(players[:2])
    players[0].publish()
    players[1].publish()

    def train() -> None:
        for worker in players[:2]:
            worker.mesh.want(range(4), ())
            worker.absorb()

    joining = [
        threading.Thread(target=player.join, args=([0, 1, 2, 3], lambda: None))
        for player in players[2:]
    ]
    for thread in joining:
        thread.start()

    def both() -> bool:
        train()
        return not any(thread.is_alive() for thread in joining)

    wait_for("both", both, 20)
    for player in players:
        player.publish()
    settled(players, 11 + 1111)


def test_the_dead_are_dropped_and_the_end_waits_for_the_living(players: list[Player]) -> None:
    connect(players)
    for player in players[1:3]:
        player.mesh.finish(0)
    assert not players[1].mesh.all_done(0)
    for player in players[:3]:
        player.mesh.want([0, 1, 2], [3])
    players[0].publish()
    # Who is at the end is waited for by nobody.
    wait_for("the ends", lambda: players[0].mesh.slowest is None, 20)
    players[0].mesh.finish(0)
    wait_for("the end", lambda: all(p.mesh.all_done(0) for p in players[:3]), 20)
    # What the last has sent came before its end.
    players[1].absorb()
    assert players[1].vector.tolist() == [1.0] * SIZE


def test_a_connection_that_breaks_is_made_again(players: list[Player]) -> None:
    connect(players)
    with players[0].mesh._lock:
        players[0].mesh._drop(players[0].mesh._peers[2])

    def again() -> bool:
        for player in players:
            player.mesh.want(range(4), ())
        return all(player.mesh.complete for player in players)

    wait_for("the connection", again, 20)
    players[0].publish()
    settled(players, 1)


def test_strangers_are_not_let_in(players: list[Player]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        addresses = dict(players[0].mesh._addresses) | {9: listener.getsockname()}
        stranger = Mesh(9, listener, addresses, "a guess", SIZE, np.float64)
        stranger.want([0], ())
        stranger.wait(0.5)
        assert not stranger.complete
        assert not players[0].mesh._peers
        stranger.close()
