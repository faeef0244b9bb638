"""Shepherds that are connected, of one node."""

from __future__ import annotations

import asyncio

from hpcft.launch.cause import Death
from hpcft.launch.fleet import Fleet, Listener
from hpcft.launch.place import Place

SECRET = b"secret"


async def _pair() -> list[Fleet]:
    listeners = [Listener("127.0.0.1") for _ in range(2)]
    peers = [
        listener.peer(Place(rank, 2, "a", "a", "127.0.0.1"))
        for rank, listener in enumerate(listeners)
    ]
    fleets = [Fleet(rank, peers, 30.0, *[lambda _: None] * 4) for rank in range(2)]
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
