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


def _ignored(*_: object) -> None:
    """What is told to nobody."""


async def _connected(nodes: str, noted: Callable[[int, Message], None] = _ignored) -> list[Fleet]:
    """A shepherd on each of these nodes, by a letter; ``noted`` is told what notes one gets."""
    listeners = [Listener("127.0.0.1") for _ in nodes]
    peers = [
        listener.peer(Place(rank, len(nodes), node, node, "127.0.0.1"))
        for rank, (listener, node) in enumerate(zip(listeners, nodes, strict=True))
    ]
    fleets = [
        Fleet(rank, peers, 30.0, _ignored, partial(noted, rank), _ignored, _ignored)
        for rank in range(len(nodes))
    ]
    await asyncio.gather(*(f.join(ls, SECRET) for f, ls in zip(fleets, listeners, strict=True)))
    return fleets


def test_nobody_leaves_before_it_is_known_why_a_rank_is_dead() -> None:
    async def story() -> set[int]:
        first, second = await _connected("aa")
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
        size = len(nodes)
        got: list[list[Message]] = [[] for _ in nodes]
        fleets = await _connected(nodes, lambda rank, note: got[rank].append(note))
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


@pytest.mark.parametrize("nodes", ["aaaa", "aabbbc", "abbca"])
def test_notes_for_all_come_from_anybody_to_everybody_once(
    nodes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = Connection.send

    def counted(connection: Connection, message: Message) -> None:
        if message.get("kind") == "pace":
            sent.append(message["world"])
        send(connection, message)

    monkeypatch.setattr(Connection, "send", counted)
    size = len(nodes)

    async def story() -> None:
        heard: list[tuple[int, int]] = []
        told = asyncio.Event()

        def hear(rank: int, note: Message) -> None:
            heard.append((rank, note["world"]))
            told.set()

        fleets = await _connected(nodes, hear)
        for fleet in fleets:
            fleet.proclaim(kind="pace", world=fleet.rank)
        while len(heard) < size**2:
            told.clear()
            await told.wait()
        for fleet in fleets:
            fleet.announce("end", 0)
        await asyncio.gather(*(fleet.leave() for fleet in fleets))
        assert sorted(heard) == [(rank, world) for rank in range(size) for world in range(size)]

    asyncio.run(asyncio.wait_for(story(), 30))
    assert sorted(sent) == sorted([*range(size)] * (size - 1))
