"""Who would be of the next launch, by what is known."""

from __future__ import annotations

from hpcft.launch.channel import Connection, Message
from hpcft.launch.company import GUESTS, Company, Peer
from hpcft.launch.door import Door


class Silent(Company):
    """Has nobody to pass facts on to."""

    def _learn(self, fact: Message, origin: Connection | None) -> None:
        if self._note(fact):
            self.on_fact(fact)


def peer(rank: int, node: str) -> Peer:
    return Peer(rank, node, node, "10.0.0.1", 1000 + rank, 2000 + rank, f"hpcft-{rank}", "17")


def company() -> tuple[Silent, list[Message]]:
    heard: list[Message] = []
    peers = [peer(0, "a"), peer(1, "a"), peer(2, "b"), peer(3, "c")]
    return Silent(0, peers, heard.append), heard


def test_lost_nodes_and_who_retires_are_not_expected_and_guests_are() -> None:
    here, _ = company()
    here.announce("lost", 2)
    here.announce("retire", 3)
    here.announce("retire", 2)
    here.announce("guest", GUESTS + 1, host="d", job="18", party="p", of=3)
    here.announce("guest", GUESTS + 2, host="d", job="18", party="p", of=3)
    here.announce("parted", GUESTS + 2)
    assert here.standing() == {0, 1, 3}
    assert here.retiring() == {3}
    assert here.guests() == {GUESTS + 1: "d"}
    assert here.awaited() == 2
    assert here.expected() == {0, 1, GUESTS + 1}
    assert [here.job(number) for number in (1, GUESTS + 1)] == ["17", "18"]


def test_a_fact_is_heard_once() -> None:
    here, heard = company()
    for _ in range(2):
        here.announce("gone", 1)
    assert heard == [{"fact": "gone", "rank": 1}]
    assert here.standing() == {0, 2, 3}


def test_a_door_is_what_was_written() -> None:
    door = Door(2, "ab", (peer(0, "a"),), ("--spares", "1", "x.py"), "/", ("os",), (3, 4, 1), 2, "")
    assert Door.of(door.to_json()) == door
