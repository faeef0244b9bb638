"""All ranks leave at the same step, whenever each of them hears that it is to leave."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.launch.channel import Connection, Message
from hpcft.launch.company import Company, Peer
from hpcft.launch.crew import Crew
from hpcft.launch.departure import Departures, Settling
from hpcft.world.departure import Departure, Replacement
from hpcft.world.progress import Progress


@dataclass
class Rank:
    """A rank that trains in lockstep with others, as far as collectives make it."""

    number: int
    answers: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Progress.create()
        self.departure = Departure(self.progress, lambda *answer: self.answers.append(answer))
        self.departure.begin(0)
        self.step = 0
        self.at_gate = False
        self.left: int | None = None

    def commit(self) -> None:
        """Complete a step, as hpcft.train.edges does; stop if the step to leave at is not known."""
        if not self.at_gate:
            self.step += 1
            self.progress.step(self.step)
        if not self.departure.asked:
            return
        # Instead of waiting it gives up, and is tried again.
        known = self.departure.over(self.step, lambda: True)
        self.at_gate = 0 not in self.departure._until
        if known:
            self.left = self.step


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_no_order_of_events_has_ranks_leave_at_different_steps(size: int, seed: int) -> None:
    chance = random.Random(seed)
    ranks = [Rank(number) for number in range(size)]
    shepherds = [Settling() for _ in ranks]
    #: What has still to arrive: at whom, and what.
    messages: list[tuple[int, str, tuple[int, int]]] = []
    asked_at = chance.randrange(30)
    for moment in range(2_000):
        if moment == asked_at:
            messages += [(number, "ask", (0, 0)) for number in range(size)]
        if messages and chance.random() < 0.3:
            to, what, (sender, value) = messages.pop(chance.randrange(len(messages)))
            if what == "ask":
                ranks[to].departure.ask("SIGUSR1")
                [(_, step)] = ranks[to].answers
                messages += [(other, "at", (to, step)) for other in range(size)]
            elif what == "at":
                shepherds[to].at(0, sender, value)
                until = shepherds[to].until(0, set(range(size)))
                if until is not None:
                    messages.append((to, "until", (0, until)))
            else:
                ranks[to].departure.settled(0, value)
        rank = chance.choice(ranks)
        # A step needs all others: nobody can complete the next before all have come to this.
        others = min(r.step for r in ranks)
        if rank.left is None and (rank.at_gate or rank.step <= others or size == 1):
            rank.commit()
        if all(rank.left is not None for rank in ranks):
            break
    assert len({rank.left for rank in ranks}) == 1
    assert ranks[0].left is not None


def test_who_does_not_train_says_so_and_who_parks_says_nothing() -> None:
    rank = Rank(0)
    rank.departure.pause()
    rank.departure.ask("SIGTERM")
    assert rank.answers == [(0, -1)]
    spare = Rank(1)
    spare.departure.wait()
    spare.departure.ask("SIGTERM")
    assert spare.answers == []
    # It takes a failed rank's place.
    spare.progress.step(7)
    spare.departure.begin(3)
    assert spare.answers == [(3, 7)]


def test_a_failure_while_the_step_is_settled_ends_the_waiting() -> None:
    rank = Rank(0)
    rank.departure.ask("SIGTERM")
    looks = iter([False, False, True])
    assert not rank.departure.over(1, lambda: next(looks))


def test_only_those_of_this_membership_count() -> None:
    settling = Settling()
    settling.at(0, 0, 100)
    settling.at(1, 0, 7)
    settling.at(1, 2, 8)
    assert settling.until(1, {0, 1, 2}) is None
    assert settling.until(1, {0, 2}) == 9


@pytest.mark.parametrize("later", [7, 9])
def test_the_first_answer_counts(later: int) -> None:
    settling = Settling()
    settling.at(0, 0, 8)
    settling.at(0, 0, later)
    assert settling.until(0, {0}) == 9


class Pair(Company):
    """Two shepherds, of which this is the first; facts come to it by :meth:`announce`."""

    def __init__(self) -> None:
        peers = [Peer(rank, "a", "a", "", 0, 0, "", "") for rank in range(2)]
        super().__init__(0, peers, lambda fact: None)

    def _learn(self, fact: Message, origin: Connection | None) -> None:
        if self._note(fact):
            self.on_fact(fact)


def test_a_shepherd_asks_its_rank_when_it_trains_and_again_in_a_new_membership() -> None:
    pair, crew = Pair(), Crew({1})
    told: list[Message] = []
    departures = Departures(pair, crew, told.append)
    pair.on_fact = lambda fact: departures.heard(fact) if "purpose" in fact else None
    departures.renew()
    pair.announce("resize", 0, reason="b joins", durable=True)
    departures.ask("resize")
    # A spare is not asked, but hears how far to go.
    assert told == []
    pair.announce("at resize 0", 1, purpose="resize", epoch=0, step=6)
    until = {"kind": "until", "purpose": "resize", "epoch": 0, "step": 7}
    assert told == [until]
    crew.active, crew.epoch = {0, 1}, 1
    departures.renew()
    asked = {"kind": "leave", "purpose": "resize", "reason": "b joins", "durable": True}
    assert told == [until, asked]
    pair.announce("at resize 1", 1, purpose="resize", epoch=1, step=8)
    departures.answered("resize", 1, 9)
    assert told[2:] == [{"kind": "until", "purpose": "resize", "epoch": 1, "step": 10}]


def test_a_replacement_is_of_one_membership() -> None:
    answers: list[tuple[int, int]] = []
    progress = Progress.create()
    replacement = Replacement(progress, lambda epoch, step: answers.append((epoch, step)))
    progress.step(5)
    replacement.begin(0)
    replacement.want(0, frozenset({2}))
    assert replacement.asked
    assert answers == [(0, 5)]
    # A failure came first; the others know nothing of a replacement in this membership.
    replacement.begin(1)
    assert not replacement.asked
    assert answers == [(0, 5)]
    # One for the next, which comes before this rank is in it.
    replacement.want(2, frozenset({3}))
    progress.step(6)
    replacement.begin(2)
    assert replacement.asked
    assert replacement.worlds == {3}
    assert answers[-1] == (2, 6)
    replacement.settled(2, 7)
    assert not replacement.over(6, lambda: False)
    assert replacement.over(7, lambda: False)


def test_a_shepherd_passes_on_a_replacement_of_the_present_membership_only() -> None:
    pair, crew = Pair(), Crew({0, 1}, 4)
    told: list[Message] = []
    departures = Departures(pair, crew, told.append)
    pair.announce("replace 3", 0, worlds=[1], logicals=[1], at=0.0)
    departures.have_replaced()
    assert told == []
    pair.announce("replace 4", 0, worlds=[0], logicals=[0], at=0.0)
    departures.have_replaced()
    assert told == [{"kind": "replace", "epoch": 4, "worlds": [0]}]
    pair.announce("replace 5", 0, worlds=[1], logicals=[0], at=0.0)
    crew.epoch = 5
    departures.renew()
    assert told[1:] == [{"kind": "replace", "epoch": 5, "worlds": [1]}]
