"""Which ranks the watchdog takes for stuck."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.launch.watchdog import JamWatch, Watchdog
from hpcft.world.progress import Progress, Reading

TIMEOUT = 10.0


def idle() -> float:
    """The processor time of a rank that uses none."""
    return 3.0


def unwanted() -> float:
    raise AssertionError("nobody needs to know the processor time now")


@pytest.fixture
def rank() -> Iterator[Progress]:
    """The page as the rank has it."""
    page = Progress.create()
    yield page
    os.close(page.fd)


@pytest.fixture
def watchdog(rank: Progress) -> Watchdog:
    # The shepherd has a mapping of its own of the same file.
    return Watchdog(Progress(rank.fd), TIMEOUT)


def test_the_shepherd_reads_what_the_rank_writes(rank: Progress) -> None:
    page = Progress(rank.fd)
    assert page.read() == Reading(running=False, step=0, calls=0, waiting=False)
    rank.run(True)
    rank.step(2**40)
    rank.enter()
    assert page.read() == Reading(running=True, step=2**40, calls=1, waiting=True)
    rank.leave()
    rank.run(False)
    assert page.read() == Reading(running=False, step=2**40, calls=2, waiting=False)


def test_nested_calls_are_one(rank: Progress) -> None:
    rank.enter()
    rank.enter()
    rank.leave()
    assert rank.read() == Reading(running=False, step=0, calls=1, waiting=True)
    rank.leave()
    assert rank.read() == Reading(running=False, step=0, calls=2, waiting=False)


def test_a_rank_that_does_nothing_is_stuck_when_time_is_up(
    rank: Progress, watchdog: Watchdog
) -> None:
    rank.run(True)
    assert watchdog.look(100.0, idle) == "fine"
    assert watchdog.look(105.0, idle) == "fine"
    assert watchdog.look(109.9, idle) == "fine"
    assert watchdog.look(110.0, idle) == "stuck"
    assert watchdog.times == 0


def test_a_rank_that_computes_is_fine_for_as_long_as_it_does(
    rank: Progress, watchdog: Watchdog
) -> None:
    rank.run(True)
    for now in range(100, 200):
        assert watchdog.look(now, lambda now=now: 0.03 * now) == "fine"
    found = [watchdog.look(now, lambda: 0.03 * 199) for now in range(200, 225)]
    assert "stuck" in found
    # Not before it has been idle for the whole time.
    assert found.index("stuck") >= 9


def test_a_rank_that_only_wakes_up_now_and_then_does_not_compute(
    rank: Progress, watchdog: Watchdog
) -> None:
    rank.run(True)
    found = [watchdog.look(now, lambda now=now: 0.01 * now) for now in range(100, 111)]
    assert found == ["fine"] * 10 + ["stuck"]


def test_a_rank_that_waits_is_a_victim_and_said_so_again_and_again(
    rank: Progress, watchdog: Watchdog
) -> None:
    rank.run(True)
    rank.step(5)
    rank.enter()
    # Waiting uses the processor, for MPI polls.
    found = [watchdog.look(float(now), lambda now=now: float(now)) for now in range(22)]
    assert [now for now, finding in enumerate(found) if finding == "waiting"] == [10, 15, 20]
    assert "stuck" not in found
    assert watchdog.times == 3
    rank.leave()
    assert watchdog.look(22, idle) == "fine"
    assert watchdog.look(31.9, idle) == "fine"
    assert watchdog.look(32, idle) == "stuck"


@pytest.mark.parametrize("sign", ["step", "calls", "run"])
def test_any_sign_of_life_starts_the_time_anew(
    rank: Progress, watchdog: Watchdog, sign: str
) -> None:
    rank.run(True)
    for now in (0, 9):
        assert watchdog.look(now, idle) == "fine"
    if sign == "step":
        rank.step(1)
    elif sign == "calls":
        rank.enter()
        rank.leave()
    else:
        rank.run(False)
        assert watchdog.look(9.5, unwanted) == "fine"
        rank.run(True)
    for now in (10, 19.9):
        assert watchdog.look(now, idle) == "fine"
    assert watchdog.look(20, idle) == "stuck"


def test_a_rank_that_need_not_advance_is_fine(rank: Progress, watchdog: Watchdog) -> None:
    rank.run(False)
    assert [watchdog.look(now, unwanted) for now in (0, 5, 50, 500)] == ["fine"] * 4
    # What it did then does not count against it afterwards.
    rank.run(True)
    assert watchdog.look(501, idle) == "fine"


def test_the_processor_time_is_not_asked_for_while_steps_advance(
    rank: Progress, watchdog: Watchdog
) -> None:
    rank.run(True)
    for step in range(100):
        rank.step(step)
        rank.enter()
        assert watchdog.look(step, unwanted) == "fine"
        rank.leave()


@given(st.lists(st.tuples(st.floats(0.01, 4.9), st.booleans()), max_size=30))
def test_whoever_advances_in_time_is_never_complained_of(
    looks: list[tuple[float, bool]],
) -> None:
    page = Progress.create()
    try:
        watchdog = Watchdog(page, TIMEOUT)
        page.run(True)
        now, advanced = 0.0, True
        for step, (pause, advances) in enumerate(looks):
            # At least at every other look, that is, in less than the timeout.
            if advances or not advanced:
                page.step(step + 1)
            advanced = advances or not advanced
            now += pause
            assert watchdog.look(now, idle) == "fine"
    finally:
        os.close(page.fd)


def test_all_wait_only_if_everyone_has_lately_been_found_to(watchdog: Watchdog) -> None:
    ranks = {0, 1, 2}
    assert not watchdog.complaints.from_all({0}, 1)
    watchdog.complaints.heard(0, 100)
    watchdog.complaints.heard(1, 103)
    assert not watchdog.complaints.from_all(ranks, 103)
    watchdog.complaints.heard(2, 104)
    assert watchdog.complaints.from_all(ranks, 104)
    assert watchdog.complaints.from_all({0, 2}, 110)
    # Rank 0 has not been heard of for longer than the timeout: it may have gone on.
    assert not watchdog.complaints.from_all(ranks, 110.1)
    assert watchdog.complaints.from_all({1, 2}, 110.1)
    watchdog.complaints.heard(0, 111)
    assert watchdog.complaints.from_all(ranks, 111)


def test_a_recovery_that_does_not_end_is_jammed(rank: Progress) -> None:
    jams = JamWatch(Progress(rank.fd), TIMEOUT)
    rank.enter()
    assert [jams.look(now) for now in (0, 50)] == [False, False]
    with rank.mending():
        found = [jams.look(float(now)) for now in range(100, 122)]
        assert [now for now, jammed in enumerate(found) if jammed] == [10, 15, 20]
        # The state is being moved, which may take its time.
        with rank.mending(False):
            assert not any(jams.look(now) for now in range(200, 300))
        assert not jams.look(300)
        assert not jams.look(309.9)
        assert jams.look(310)
    assert not jams.look(400)
    assert jams.times == 4


def test_short_stays_in_recoveries_do_not_add_up(rank: Progress) -> None:
    jams = JamWatch(Progress(rank.fd), TIMEOUT)
    for now in range(100):
        rank.enter()
        with rank.mending():
            assert not jams.look(now)
        rank.leave()
