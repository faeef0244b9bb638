"""Who is slower than the others is named, and who waits for him is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import assume, given
from hypothesis import strategies as st
from runs import eventful, leave, start, status, steps

from hpcft.report.pace import Pace
from hpcft.report.story import tell
from hpcft.report.stragglers import stragglers
from hpcft.telemetry.laps import bucket


def paces(times: Sequence[float], steps: int = 100) -> list[Pace]:
    """Of ranks that compute so long in a step; all wait for the slowest."""
    slowest = max(times)
    return [
        Pace(
            0,
            rank,
            rank,
            steps,
            steps * time,
            steps * (slowest - time),
            0.0,
            {bucket(time): steps},
        )
        for rank, time in enumerate(times)
    ]


def named(found: Sequence[Pace]) -> set[int]:
    return {one.rank for one in stragglers(found)}


ordinary = st.floats(0.1, 0.105)


@given(st.lists(ordinary, min_size=1, max_size=40), st.floats(1.6, 50), st.data())
def test_the_slow_one_is_named_and_no_victim(
    others: list[float], factor: float, data: st.DataObject
) -> None:
    slow = data.draw(st.integers(0, len(others)))
    times = [*others[:slow], 0.1 * factor, *others[slow:]]
    assert named(paces(times)) == {slow}


@given(st.lists(ordinary, min_size=1, max_size=40))
def test_where_all_are_alike_nobody_is_named(times: list[float]) -> None:
    assert named(paces(times)) == set()


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=30))
def test_who_is_named_is_slower_than_who_is_not(times: list[float]) -> None:
    found = named(paces(times))
    assert len(found) <= len(times) / 2
    left = set(range(len(times))) - found
    assert all(times[slow] > 0.9 * max(times[rank] for rank in left) for slow in found)


@given(st.lists(st.floats(0.05, 0.2), min_size=5, max_size=30), st.randoms())
def test_the_order_of_the_ranks_does_not_matter(times: list[float], random: object) -> None:
    assume(len(set(times)) == len(times))
    shuffled = list(times)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    slow = {times[rank] for rank in named(paces(times))}
    assert {shuffled[rank] for rank in named(paces(shuffled))} == slow


def test_several_slow_ones_do_not_hide_each_other() -> None:
    assert named(paces([0.1, 0.1, 0.3, 0.3, 0.1, 0.1])) == {2, 3}
    assert named(paces([0.1, 0.3])) == {1}


def test_a_few_steps_say_nothing() -> None:
    assert named(paces([0.1, 0.1, 0.5], steps=5)) == set()


def test_each_launch_is_judged_by_itself() -> None:
    # Of fewer ranks each may have more to do.
    first, second = paces([0.1, 0.1, 0.1]), paces([0.3, 0.3])
    moved = [
        Pace(1, p.world, p.rank, p.steps, p.compute, p.waiting, p.saving, p.buckets) for p in second
    ]
    assert named(first + moved) == set()


def test_a_slow_rank_is_told_with_the_evidence(tmp_path: Path) -> None:
    story = tell(eventful(tmp_path / "run", {"loss": 1.0}), status())
    assert {slow.rank for slow in story.stragglers} == {1}
    slow = story.stragglers[0]
    assert slow.median > 4 * slow.others
    assert slow.waiting < slow.others_waiting
    assert [rank.slow for rank in story.ranks] == [False, True, False]
    assert any(said.startswith("Rank 1 computes") for said in story.look_at)
    rows = {row.name: {mark.kind for mark in row.marks} for row in story.timeline.rows}
    assert "slow" in rows["rank 1"]
    assert all("slow" not in kinds for name, kinds in rows.items() if name != "rank 1")


def test_one_rank_has_nobody_to_be_compared_with(tmp_path: Path) -> None:
    path = leave(tmp_path / "run", [start(0, 1)], steps(0, 1, 100, 0))
    assert tell(path, status()).stragglers == ()
