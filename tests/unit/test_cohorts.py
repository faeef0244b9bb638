"""Steps are made by those who come first, and nobody is left behind or held up."""

from __future__ import annotations

import asyncio
import heapq
import random
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from hpcft.launch.cohorts import Cohorts, Settling
from hpcft.world import cohort as theirs
from hpcft.world.cohort import Cohort


@dataclass
class Rank:
    """A rank as far as cohorts are concerned: at some step, in one of the ways of waiting."""

    step: int = 0
    state: str = "computing"


@settings(max_examples=80)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 25), st.integers(0, 10**6))
def test_any_delays_lead_all_ranks_to_the_last_step(
    size: int, backup: int, steps: int, seed: int
) -> None:
    chance = random.Random(seed)
    slow = {rank for rank in range(size) if chance.random() < 0.3}
    settling = Settling(size, backup)
    ranks = [Rank() for _ in range(size)]
    made: list[Cohort] = []
    over = False
    queue: list[tuple[float, int]] = []

    def compute(rank: int, now: float) -> None:
        ranks[rank].state = "computing" if ranks[rank].step < steps else "done"
        delay = chance.random() * (chance.choice([1, 30]) if rank in slow else 1)
        heapq.heappush(queue, (now + delay, rank))

    def take(cohorts: list[Cohort], now: float) -> None:
        nonlocal over
        for cohort in cohorts:
            if cohort.over:
                over = True
                continue
            if cohort.ranks:
                made.append(cohort)
                assert len(cohort.ranks) >= max(1, size - backup)
            for rank in cohort.ranks:
                assert (ranks[rank].state, ranks[rank].step) == ("ready", cohort.step)
            assert cohort.giver not in cohort.joining
            if cohort.ranks:
                assert cohort.giver in cohort.ranks
            else:
                # It waits, and has the state that is to be given.
                assert ranks[cohort.giver].state in ("ready", "completed")
                assert ranks[cohort.giver].step == cohort.step + 1
            for rank in cohort.joining:
                assert ranks[rank].state == "ready"
                assert ranks[rank].step < cohort.step + 1
            for rank in (*cohort.ranks, *cohort.joining):
                ranks[rank].step = cohort.step + 1
                compute(rank, now)

    for rank in range(size):
        compute(rank, 0.0)
    while queue:
        now, number = heapq.heappop(queue)
        rank = ranks[number]
        if rank.state == "computing":
            rank.state = "ready"
            take(settling.ready(number, rank.step), now)
        else:
            rank.state = "completed"
            take(settling.completed(number, rank.step), now)
        # Sooner or later patience ends.
        if not queue or chance.random() < 0.5:
            if settling.enough:
                take(settling.settle(), now)
            elif settling.wanting:
                take(settling.recruit(), now)
    assert over
    assert [cohort.step for cohort in made] == list(range(steps))
    assert {rank.step for rank in ranks} == {steps}


def test_who_is_only_a_little_late_is_waited_for() -> None:
    async def story() -> list[dict[str, object]]:
        said: list[dict[str, object]] = []
        cohorts = Cohorts(1, lambda **note: said.append(note))

        def ready(rank: int, step: int) -> None:
            note = {"kind": "ready", "epoch": 0, "size": 2, "logical": rank, "step": step}
            cohorts.heard(note)

        for step in range(3):
            for rank in range(2):
                ready(rank, step)
            await asyncio.sleep(0.05)
        ready(0, 3)
        early = len(said)
        ready(1, 3)
        assert (early, len(said)) == (3, 4)
        ready(0, 4)
        while len(said) < 5:
            await asyncio.sleep(0.001)
        return said

    said = asyncio.run(story())
    assert [note["ranks"] for note in said] == [(0, 1)] * 4 + [(0,)]


def test_late_ranks_make_up_for_one_that_does_not_come() -> None:
    settling = Settling(3, 1)
    (first,) = [*settling.ready(0, 0), *settling.ready(2, 0), *settling.settle()]
    assert first.ranks == (0, 2)
    settling.ready(1, 0)
    settling.ready(0, 1)
    assert settling.wanting
    assert settling.recruit() == [Cohort(0, (), (1,), 0)]
    settling.ready(1, 1)
    assert settling.settle() == [Cohort(1, (0, 1), (), 1)]


def test_a_new_membership_settles_its_own_steps() -> None:
    said: list[dict[str, object]] = []
    cohorts = Cohorts(1, lambda **note: said.append(note))

    async def story() -> None:
        for epoch, size, rank in ((0, 3, 0), (1, 2, 0), (0, 3, 1), (1, 2, 1)):
            note = {"kind": "ready", "epoch": epoch, "size": size, "logical": rank, "step": 7}
            cohorts.heard(note)

    asyncio.run(story())
    assert [(note["epoch"], note["ranks"]) for note in said] == [(1, (0, 1))]


def test_a_rank_takes_no_notice_of_what_was_settled_in_another_membership() -> None:
    mine = theirs.Cohorts(lambda kind, **said: None)
    mine.begin(2, 3)
    old = {"epoch": 1, "step": 4, "ranks": [0, 1], "joining": [], "giver": 0, "over": False}
    mine.told(old)
    assert mine.ready(0, 4, failed=lambda: True) is None
    mine.told(old | {"epoch": 2})
    assert mine.ready(0, 4, failed=lambda: True) == Cohort(4, (0, 1), (), 0)
