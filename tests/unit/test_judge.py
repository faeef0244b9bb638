"""Who is found slow while a run goes on, and that victims are not."""

from __future__ import annotations

import random
from dataclasses import asdict
from statistics import median_low
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.launch.judge import Evidence, Judge, Laps, Note
from hpcft.launch.stragglers import Former, choose
from hpcft.telemetry.laps import bucket
from hpcft.telemetry.outliers import compare


def rounds(
    judge: Judge, times: list[dict[int, float]], slow: set[int], epoch: int = 0
) -> list[Evidence]:
    """Notes of these computing times, in which who is faster waits for the slowest."""
    changed = []
    for number, one in enumerate(times):
        longest = max(one.values())
        for world, seconds in one.items():
            note = Note(world, world, epoch, 10 * number, seconds, longest - seconds, number)
            changed += judge.heard(note, one.keys(), epoch, slow)
    return changed


def test_the_slow_is_found_after_some_rounds_and_its_victims_are_not() -> None:
    usual, slow = {0: 0.010, 1: 0.011, 2: 0.010, 3: 0.0105}, {2: 0.060}
    judge = Judge()
    assert rounds(judge, [usual | slow] * 2, set()) == []
    [found] = rounds(judge, [usual | slow], set())
    assert (found.world, found.slow, found.step) == (2, True, 0)
    assert found.standing.factor == pytest.approx(6, rel=0.1)
    # It waits for nobody, and the others for it.
    assert found.waiting == 0
    assert found.others_waiting == pytest.approx(0.049, abs=0.002)
    # What is known is not said again.
    assert rounds(judge, [usual | slow] * 5, {2}) == []
    assert rounds(judge, [usual] * 2, {2}) == []
    [over] = rounds(judge, [usual], {2})
    assert (over.world, over.slow) == (2, False)


def test_a_hiccup_is_no_straggler() -> None:
    usual = {0: 0.010, 1: 0.010, 2: 0.010}
    assert rounds(Judge(), [usual | {1: 0.05}, usual | {1: 0.05}, usual] * 10, set()) == []


def test_between_slow_and_alike_nothing_changes() -> None:
    usual = {0: 0.010, 1: 0.010, 2: 0.010}
    judge = Judge()
    assert rounds(judge, [usual | {1: 0.0115}] * 10, set()) == []
    assert rounds(judge, [usual | {1: 0.0115}] * 10, {1}) == []


def test_after_a_recovery_all_is_counted_anew() -> None:
    slow = {0: 0.010, 1: 0.010, 2: 0.050}
    judge = Judge()
    assert rounds(judge, [slow] * 2, set(), epoch=0) == []
    assert rounds(judge, [slow] * 2, set(), epoch=1) == []
    # Notes of a former membership that come late.
    note = Note(2, 2, 0, 99, 0.05, 0.0, 0.0)
    assert judge.heard(note, {0, 1, 2}, 1, set()) == []
    [found] = rounds(judge, [slow], set(), epoch=1)
    assert found.world == 2


def test_of_two_the_slower_is_found_and_one_alone_is_not_judged() -> None:
    [found] = rounds(Judge(), [{0: 0.030, 1: 0.010}] * 3, set())
    assert found.world == 0
    assert rounds(Judge(), [{0: 0.030}] * 10, set()) == []


@given(
    st.integers(3, 40),
    st.floats(0.001, 10),
    st.floats(0, 0.04),
    st.integers(0, 1000),
    st.floats(1.5, 20),
)
def test_the_slow_are_told_from_noise(
    size: int, step: float, noise: float, seed: int, factor: float
) -> None:
    chance = random.Random(seed)
    slow = set(chance.sample(range(size), chance.randint(0, (size - 1) // 3)))
    judge = Judge()

    def one() -> dict[int, float]:
        return {
            world: step * (factor if world in slow else 1) * chance.uniform(1 - noise, 1 + noise)
            for world in range(size)
        }

    found = rounds(judge, [one() for _ in range(3)], set())
    assert {evidence.world for evidence in found if evidence.slow} == slow


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=50))
def test_half_are_never_slow(times: list[float]) -> None:
    standings = compare(dict(enumerate(times)))
    far = [standing for standing in standings.values() if standing.far]
    assert len(far) <= len(times) // 2
    assert all(standing.value > median_low(times) for standing in far)
    assert not any(standing.far and standing.alike for standing in standings.values())


def lap(first: int, steps: int, compute: float, began: float, ended: float, epoch: int = 0) -> Any:
    return {
        "rank": 3,
        "epoch": epoch,
        "first": first,
        "last": first + steps - 1,
        "began": began,
        "ended": ended,
        "waiting": steps * 0.5,
        # As they come over the link.
        "buckets": {str(bucket(compute)): steps},
    }


def test_laps_are_made_notes_of_now_and_then() -> None:
    laps = Laps(size=4)
    assert laps.add(7, lap(1, 10, 0.02, 100.0, 100.3)) is None
    note = laps.add(7, lap(11, 40, 0.02, 100.3, 101.2))
    assert note is not None
    assert (note.world, note.logical, note.step, note.began) == (7, 3, 50, 100.0)
    assert note.compute == pytest.approx(0.02, rel=0.1)
    assert note.waiting == pytest.approx(0.5)
    # Some steps it must be.
    assert laps.add(7, lap(51, 4, 9.0, 101.2, 140.0)) is None
    assert laps.add(7, lap(55, 1, 9.0, 140.0, 149.0)) is not None


def test_a_note_is_of_one_membership() -> None:
    laps = Laps(size=4)
    assert laps.add(7, lap(1, 10, 0.5, 100.0, 100.3)) is None
    note = laps.add(7, lap(8, 60, 0.02, 100.3, 102.0, epoch=1))
    assert note is not None
    assert (note.epoch, note.began) == (1, 100.3)
    assert note.compute == pytest.approx(0.02, rel=0.1)


def test_a_message_has_the_note() -> None:
    note = Note(7, 3, 1, 50, 0.02, 0.5, 100.0)
    assert Note.of({"kind": "pace", "to": None, **asdict(note)}) == note


def test_the_slowest_change_places_as_far_as_there_are_spares() -> None:
    slow = {4: (0, 2.0), 5: (1, 3.0), 6: (2, 2.5)}
    assert choose(slow, 2, [], now=1000.0) == [5, 6]
    assert choose(slow, 0, [], now=1000.0) == []


def test_replacements_are_rare_and_who_is_slow_with_every_process_is_left_alone() -> None:
    slow = {4: (0, 2.0), 5: (1, 3.0)}
    assert choose(slow, 2, [Former(950.0, frozenset({7}))], now=1000.0) == []
    assert choose(slow, 2, [Former(900.0, frozenset({1}))], now=1000.0) == [4]
    assert choose(slow, 2, [Former(100.0, frozenset({1}))], now=1000.0) == [5, 4]
