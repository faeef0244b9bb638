"""On which node the copies of a rank's checkpoints come to lie."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcft.ckpt.near import NearStore, Tier
from hpcft.launch.channel import Message
from hpcft.launch.copies import Copies
from hpcft.launch.courier import Courier
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet, Listener
from hpcft.launch.place import Place

SECRET = b"secret"
NAME = "000000000007-0123abcd"


def fleets(nodes: Sequence[str]) -> list[Fleet]:
    """Shepherds that know of each other, each on the node that is named."""
    listeners = [Listener("127.0.0.1") for _ in nodes]
    peers = [
        listener.peer(Place(rank, len(nodes), node, node, "127.0.0.1"))
        for rank, (node, listener) in enumerate(zip(nodes, listeners, strict=True))
    ]
    made = []
    for rank in range(len(nodes)):
        made.append(Fleet(rank, peers, 30.0, *[lambda _: None] * 4))
    for listener in listeners:
        for sock in (listener.tcp, listener.courier, listener.unix):
            sock.close()
    return made


def keepers(nodes: str, active: set[int], idle_first: bool) -> str:
    """The node that keeps copies for each rank that trains; - for none."""
    peers = [fleet.partner(active, idle_first) for fleet in fleets(nodes) if fleet.rank in active]
    return "".join(peer.node if peer else "-" for peer in peers)


@pytest.mark.parametrize(
    ("nodes", "active", "usually", "idle_first"),
    [
        # Two nodes train, one waits.
        ("aabbcc", {0, 1, 2, 3}, "bbaa", "cccc"),
        # A spare beside ranks that train makes no node idle.
        ("aabbcc", {0, 1, 2, 3, 4}, "bbcca", "bbcca"),
        # Several nodes that wait share the work.
        ("abcdef", {0, 1, 2, 3}, "bcda", "efef"),
        # Nowhere else to go.
        ("aaa", {0, 1}, "--", "--"),
        # Only one node trains.
        ("aabb", {0, 1}, "bb", "bb"),
    ],
)
def test_idle_nodes_come_first_if_that_is_wanted(
    nodes: str, active: set[int], usually: str, idle_first: str
) -> None:
    assert keepers(nodes, active, False) == usually
    assert keepers(nodes, active, True) == idle_first


def test_ranks_of_a_node_go_to_different_shepherds_of_an_idle_one() -> None:
    three = [fleet.partner({0, 1, 2}, True) for fleet in fleets("abbcc")[:3]]
    assert [peer.rank for peer in three if peer] == [3, 4, 3]


def test_a_node_that_is_lost_keeps_nothing() -> None:
    first, *_ = fleets("abc")
    first.announce("lost", 2)
    partner = first.partner({0, 1}, True)
    assert partner
    assert partner.node == "b"


def test_copies_of_ranks_that_train_lie_on_the_idle_node_alone(tmp_path: Path) -> None:
    nodes = "abc"
    stores = [NearStore(tmp_path / node) for node in nodes]
    told: dict[int, Message] = {}

    async def story() -> None:
        listeners = [Listener("127.0.0.1") for _ in nodes]
        peers = [
            listener.peer(Place(rank, 3, nodes[rank], nodes[rank], "127.0.0.1"))
            for rank, listener in enumerate(listeners)
        ]
        every = [Fleet(r, peers, 30.0, *[lambda _: None] * 4) for r in range(3)]
        couriers = [Courier(rank, [stores[rank]]) for rank in range(3)]
        for courier, listener in zip(couriers, listeners, strict=True):
            await courier.listen(listener.courier, SECRET)
        await asyncio.gather(*(f.join(ls, SECRET) for f, ls in zip(every, listeners, strict=True)))
        crew = Crew({0, 1})
        tier = Tier(5, False, str(tmp_path))
        answered = asyncio.Event()
        for rank in (0, 1):
            folder = stores[rank].path / NAME
            folder.mkdir(parents=True)
            (folder / f"shard-{rank:05d}.h5").write_bytes(bytes([rank]) * 5000)

            def tell(message: Message, rank: int = rank) -> None:
                told[rank] = message
                if len(told) == 2:
                    answered.set()

            copies = Copies(couriers[rank], every[rank], crew, [tier], tell, idle_first=True)
            copies.make(0, NAME, [f"shard-{rank:05d}.h5"])
            # Else the task would have nobody to hold it.
            told_by.append(copies)
        await answered.wait()
        every[0].announce("end", 0)
        await asyncio.gather(*(fleet.leave() for fleet in every))
        for courier in couriers:
            courier.close()

    told_by: list[Copies] = []
    asyncio.run(story())
    assert [told[rank]["why"] for rank in (0, 1)] == ["", ""]
    kept = {
        node: [f.name for f in store.files().get(NAME, []) if f.copy]
        for node, store in zip(nodes, stores, strict=True)
    }
    assert {node: sorted(names) for node, names in kept.items()} == {
        "a": [],
        "b": [],
        "c": ["shard-00000.h5", "shard-00001.h5"],
    }
