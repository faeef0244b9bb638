"""Partitions, losses and stalls in a simulated network: no two sides may ever go on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.launch.quorum import Quorum

TIMEOUT, LEASE, PERIOD = 0.8, 0.56, 0.08
#: Periods a message takes from node to node, at the longest delay tried.
_HOP = 3


@dataclass
class Node:
    quorum: Quorum
    clock: dict[int, float] = field(default_factory=dict)
    held: bool = False
    dead: bool = False
    gone_at: dict[int, float] = field(default_factory=dict)
    stopped_at: float | None = None

    @property
    def runs(self) -> bool:
        return not self.dead and not self.held


@dataclass(frozen=True)
class Beat:
    at: float
    source: int
    clock: float
    echo: float | None
    suspects: frozenset[int]
    gone: frozenset[int]


class Network:
    """Nodes that beat and judge, with links that can be cut and a delay on every message."""

    def __init__(self, nodes: int, offsets: list[float]) -> None:
        self.offset = offsets
        weights = dict.fromkeys(range(nodes), 1)
        self.nodes = {
            n: Node(Quorum(n, weights, TIMEOUT, LEASE, self.offset[n])) for n in range(nodes)
        }
        self.cut: set[frozenset[int]] = set()
        self.frozen: set[int] = set()
        self.now = 0.0
        self.inbox: dict[int, list[Beat]] = {n: [] for n in range(nodes)}

    def reach(self, a: int, b: int) -> bool:
        return frozenset((a, b)) not in self.cut

    def step(self, delay: float) -> None:
        """One beat period."""
        self.now += PERIOD
        for n, node in self.nodes.items():
            if n in self.frozen or node.dead:
                continue
            # What has arrived is read before silence is judged.
            self.deliver(n)
            verdict = node.quorum.tick(self.now + self.offset[n])
            node.quorum.decided()
            for other in node.quorum.gone:
                node.gone_at.setdefault(other, self.now)
            if not node.held and verdict.hold:
                node.stopped_at = self.now
            node.held = verdict.hold
            if verdict.fenced:
                node.dead = True
                continue
            for other in self.nodes:
                if other != n and self.reach(n, other):
                    self.inbox[other].append(
                        Beat(
                            self.now + delay,
                            n,
                            self.now + self.offset[n],
                            node.clock.get(other) if node.quorum.answers(other) else None,
                            node.quorum.suspects,
                            frozenset(node.quorum.gone),
                        )
                    )

    def deliver(self, to: int) -> None:
        node = self.nodes[to]
        due = [beat for beat in self.inbox[to] if beat.at <= self.now]
        self.inbox[to] = [beat for beat in self.inbox[to] if beat.at > self.now]
        for beat in due:
            # What a cut link holds back is lost here; a message of any age may come late.
            if self.reach(beat.source, to):
                node.clock[beat.source] = beat.clock
                node.quorum.heard(beat.source, self.now + self.offset[to], beat.echo)
                node.quorum.told(beat.source, beat.suspects)
                for lost in beat.gone:
                    node.quorum.lost(lost)


def steps(network: Network, seconds: float, delay: float = 0.01) -> None:
    for _ in range(round(seconds / PERIOD)):
        network.step(delay)


def test_nothing_happens_while_all_is_well() -> None:
    network = Network(4, [0, 100, 7, 3])
    steps(network, 10)
    assert all(node.runs and not node.quorum.suspects for node in network.nodes.values())


def test_a_cut_off_node_is_held_before_the_others_go_on_without_it() -> None:
    network = Network(4, [0, 0, 0, 0])
    steps(network, 2)
    network.cut = {frozenset((3, n)) for n in range(3)}
    steps(network, 2)
    for n in range(3):
        assert network.nodes[n].runs
        assert network.nodes[n].quorum.gone == {3}
        assert network.nodes[3].stopped_at is not None
        assert network.nodes[3].stopped_at <= network.nodes[n].gone_at[3]
    assert not network.nodes[3].runs
    network.cut = set()
    steps(network, 5)
    assert not network.nodes[3].runs


def test_of_two_halves_the_one_with_the_lowest_node_goes_on() -> None:
    network = Network(4, [0, 0, 0, 0])
    steps(network, 1)
    network.cut = {frozenset(pair) for pair in itertools.product((0, 1), (2, 3))}
    steps(network, 3)
    assert [network.nodes[n].runs for n in range(4)] == [True, True, False, False]


def test_a_machine_that_stalls_as_a_whole_goes_on_afterwards() -> None:
    network = Network(3, [0, 0, 0])
    steps(network, 1)
    network.now += 30
    steps(network, 2)
    assert all(node.runs and not node.quorum.suspects for node in network.nodes.values())


def test_a_node_closed_for_certain_does_not_count() -> None:
    network = Network(2, [0, 0])
    steps(network, 1)
    network.nodes[0].dead = True
    network.nodes[1].quorum.lost(0)
    steps(network, 3)
    assert network.nodes[1].runs


@settings(max_examples=1000)
@given(st.data())
def test_never_do_two_sides_that_lost_each_other_run(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 6), "nodes")
    offsets = [data.draw(st.floats(0, 1000)) for _ in range(count)]
    network = Network(count, offsets)
    pairs = [frozenset(p) for p in itertools.combinations(range(count), 2)]
    for _ in range(data.draw(st.integers(1, 5), "phases")):
        network.cut = set(data.draw(st.sets(st.sampled_from(pairs)), "cut"))
        network.frozen = data.draw(st.sets(st.sampled_from(range(count)), max_size=count - 1))
        delay = data.draw(st.sampled_from([0.0, 0.03, 0.1]))
        both_run = dict.fromkeys(itertools.permutations(network.nodes, 2), 0)
        for _ in range(data.draw(st.integers(1, 40), "periods")):
            network.step(delay)
            for a, b in both_run:
                one, other = network.nodes[a], network.nodes[b]
                both = one.runs and other.runs and b in one.quorum.gone and b not in network.frozen
                assert not both or a not in other.quorum.gone
                both_run[a, b] = both_run[a, b] + 1 if both else 0
                # It is told, or its lease ends.
                assert both_run[a, b] <= LEASE / PERIOD + _HOP * count
    network.cut, network.frozen = set(), set()
    steps(network, 6)
    running = [n for n, node in network.nodes.items() if node.runs]
    for a, b in itertools.permutations(running, 2):
        assert b not in network.nodes[a].quorum.gone
