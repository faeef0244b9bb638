"""Those who share facts about a launch, as one of them sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hpcft.launch.channel import Connection, Message

#: Numbers of guests begin here; below are ranks.
GUESTS = 1 << 20


@dataclass(frozen=True)
class Peer:
    """Where a rank's shepherd is.

    rank: its MPI rank.
    node: key of its node; equal for the shepherds that share one.
    host: the node's name for people.
    address, port: where it listens for the leaders of other nodes.
    courier: port at which it takes in files.
    local: name of the abstract Unix socket it listens at for its own node.
    job: its Slurm job; empty outside of one.
    """

    rank: int
    node: str
    host: str
    address: str
    port: int
    courier: int
    local: str
    job: str


class Company:
    """What is known, and how to add to it.

    Parameters
    ----------
    rank: this one's rank, or its number as a guest.
    peers: the table of all shepherds.
    on_fact: called with every fact that is new, own ones included.

    Attributes
    ----------
    fenced: whether the others go on without this one.
    """

    def __init__(self, rank: int, peers: list[Peer], on_fact: Callable[[Message], None]) -> None:
        self.rank = rank
        self._peers = {peer.rank: peer for peer in peers}
        nodes: dict[str, list[int]] = {}
        for peer in sorted(peers, key=lambda p: p.rank):
            nodes.setdefault(peer.node, []).append(peer.rank)
        #: leader -> ranks of its node
        self._nodes = {ranks[0]: ranks for ranks in nodes.values()}
        self._facts: dict[tuple[str, int], Message] = {}
        self.on_fact = on_fact
        self.fenced = False

    @property
    def gone(self) -> bool:
        """Whether this one hears nothing of the others any more."""
        return False

    @property
    def hosts(self) -> dict[int, str]:
        """Where every rank is, by its name for people."""
        return {rank: peer.host for rank, peer in self._peers.items()}

    def job(self, number: int) -> str:
        """The Slurm job of a rank's shepherd, or of a guest; empty outside of one."""
        if number in self._peers:
            return self._peers[number].job
        job: str = self.said("guest")[number]["job"]
        return job

    def announce(self, fact: str, rank: int, **detail: object) -> None:
        """Let everybody know something about ``rank``."""
        self._learn({"fact": fact, "rank": rank, **detail}, None)

    def facts(self) -> list[Message]:
        """All that is known."""
        return list(self._facts.values())

    def known(self, fact: str) -> set[int]:
        """The ranks of which ``fact`` is known."""
        return set(self.said(fact))

    def said(self, fact: str) -> dict[int, Message]:
        """What is known of ``fact``, by rank."""
        return {rank: message for (kind, rank), message in self._facts.items() if kind == fact}

    def standing(self) -> set[int]:
        """The ranks whose shepherds are there, as far as is known."""
        lost = {rank for leader in self.known("lost") for rank in self._nodes[leader]}
        return set(self._peers) - lost - self.known("gone")

    def retiring(self) -> set[int]:
        """The ranks whose shepherds are there, and are not to be of the next launch."""
        return self.standing() & self.known("retire")

    def guests(self) -> dict[int, str]:
        """Who else would be of the next launch, and where that is."""
        gone = self.known("parted") | self.known("bye")
        said = self.said("guest").items()
        return {number: guest["host"] for number, guest in said if number not in gone}

    def awaited(self) -> int:
        """How many guests are still to come, as those who belong together say."""
        said = self.said("guest")
        parties = Counter((said[n]["party"], said[n]["of"]) for n in self.guests())
        return sum(max(of - there, 0) for (_, of), there in parties.items())

    def expected(self) -> set[int]:
        """Who is to be of the next launch, should there be one."""
        return (self.standing() - self.retiring()) | self.guests().keys()

    async def leave(self) -> None:
        """Part from the others."""
        raise NotImplementedError

    def _learn(self, fact: Message, origin: Connection | None) -> None:
        """Note a fact, and pass it on to all but where it comes from."""
        raise NotImplementedError

    def _note(self, fact: Message) -> bool:
        """Whether a fact is new; one with a serial number replaces those of lower ones."""
        key = (fact["fact"], fact["rank"])
        known = self._facts.get(key)
        if known is not None and fact.get("serial", 0) <= known.get("serial", 0):
            return False
        self._facts[key] = fact
        return True
