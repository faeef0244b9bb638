"""Shepherds that are connected, of one node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import pytest

from hpcft.launch.cause import Death
from hpcft.launch.channel import Connection, Message
from hpcft.launch.fleet import Fleet, Listener
from hpcft.launch.place import Place

SECRET = b"secret"


async def _pair() -> list[Fleet]:
    return await _connected(["a", "a"], lambda rank, fact: None)


async def _connected(nodes: list[str], heard: Callable[[int, Message], None]) -> list[Fleet]:
    """A shepherd on each of these nodes; of all facts that are new to one, ``heard`` is told."""
    listeners = [Listener("127.0.0.1") for _ in nodes]
    peers = [
        listener.peer(Place(rank, len(nodes), node, node, "127.0.0.1"))
        for rank, (listener, node) in enumerate(zip(listeners, nodes, strict=True))
    ]
    fleets = [
        Fleet(rank, peers, 30.0, partial(heard, rank), *[lambda _: None] * 3)
        for rank in range(len(nodes))
    ]
    await asyncio.gather(*(f.join(ls, SECRET) for f, ls in zip(fleets, listeners, strict=True)))
    return fleets


def test_nobody_leaves_before_it_is_known_why_a_rank_is_dead() -> None:
    async def story() -> set[int]:
        first, second = await _pair()
        first.announce("end", 0)
        leaving = asyncio.ensure_future(first.leave())
        second.announce_end(1, 1.0)
        while not first.known("dead"):
            await asyncio.sleep(0.001)
        # The kernel takes its time to tell of a death.
        await asyncio.sleep(0.1)
        early = leaving.done()
        second.announce_death(Death(1, "killed by SIGKILL", 1.0))
        await asyncio.gather(leaving, second.leave())
        assert not early
        return first.known("cause")

    assert asyncio.run(story()) == {1}


def test_notes_get_from_any_shepherd_to_the_settler_and_back_to_all() -> None:
    async def story(nodes: str) -> None:
        listeners = [Listener("127.0.0.1") for _ in nodes]
        size = len(nodes)
        peers = [
            listener.peer(Place(rank, size, nodes[rank], nodes[rank], "127.0.0.1"))
            for rank, listener in enumerate(listeners)
        ]
        got: list[list[Message]] = [[] for _ in nodes]
        fleets = [
            Fleet(rank, peers, 30.0, lambda _: None, got[rank].append, *[lambda _: None] * 2)
            for rank in range(size)
        ]
        await asyncio.gather(*(f.join(ls, SECRET) for f, ls in zip(fleets, listeners, strict=True)))
        for fleet in fleets:
            fleet.note(fleets[0].settler({1, 2}), of=fleet.rank)
        settler = fleets[0].settler({1, 2})
        while len(got[settler]) < size:
            await asyncio.sleep(0.001)
        assert {note["of"] for note in got[settler]} == set(range(size))
        fleets[settler].proclaim(of=-1)
        while not all(notes and notes[-1]["of"] == -1 for notes in got):
            await asyncio.sleep(0.001)
        # Each once.
        assert [len(notes) for notes in got] == [
            1 + size * (rank == settler) for rank in range(size)
        ]
        for fleet in fleets:
            fleet.announce("bye", fleet.rank)
        await asyncio.gather(*(fleet.leave() for fleet in fleets))

    for nodes in ("aaaa", "aabb", "abc", "abbca"):
        asyncio.run(story(nodes))


@pytest.mark.parametrize("nodes", [["a"] * 4, ["a", "a", "b", "b", "b", "c"]])
def test_notes_come_to_everybody_once_and_the_newest_stays(
    nodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = Connection.send

    def counted(connection: Connection, message: Message) -> None:
        if message.get("fact") == "pace":
            sent.append(message["serial"])
        send(connection, message)

    monkeypatch.setattr(Connection, "send", counted)
    size = len(nodes)

    async def story() -> None:
        heard: list[tuple[int, int]] = []
        told = asyncio.Event()

        def hear(rank: int, fact: Message) -> None:
            if fact["fact"] == "pace":
                heard.append((rank, fact["serial"]))
                told.set()

        fleets = await _connected(nodes, hear)
        for serial in (1, 2, 3):
            fleets[1].announce("pace", 1, serial=serial, compute=float(serial))
            while len(heard) < size * serial:
                told.clear()
                await told.wait()
        # What comes late changes nothing.
        fleets[0]._learn({"fact": "pace", "rank": 1, "serial": 2, "compute": 0.0}, None)
        assert sorted(heard) == [(rank, serial) for rank in range(size) for serial in (1, 2, 3)]
        for fleet in fleets:
            assert fleet.said("pace")[1]["compute"] == 3.0
            fleet.announce("end", 0, serial=9)
        await asyncio.gather(*(fleet.leave() for fleet in fleets))

    asyncio.run(asyncio.wait_for(story(), 30))
    assert sorted(sent) == sorted([1, 2, 3] * (size - 1))
