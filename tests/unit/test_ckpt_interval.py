"""How often to save: the optimum, its estimate, what bounds it, and what is remembered."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.ckpt import interval
from hpcft.ckpt.history import Habit, History

HOUR = 3600.0
costs = st.floats(1e-3, 1e3)
mtbfs = st.floats(60, 1e8)


def test_the_optimum_is_what_daly_has_and_young_where_a_save_costs_little() -> None:
    # 5 min a save, a failure a day: Young's sqrt(2 C M) is 2 h; Daly's terms take some off.
    young, root = 7200, math.sqrt(300 / (2 * 24 * HOUR))
    daly = young * (1 + root / 3 + root**2 / 9) - 300
    assert math.isclose(interval.optimum(300, 24 * HOUR), daly)
    assert 6990 < daly < 7010
    assert math.isclose(interval.optimum(1, 1e8), math.sqrt(2e8), rel_tol=1e-3)
    assert interval.optimum(500, 200) == 200


@pytest.mark.parametrize(("mtbf", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_optimum_is_what_dalys_figures_have(mtbf: float, minutes: float) -> None:
    """The captions of figures 3, 4 and 5 of Daly 2006, for a dump of 5 minutes."""
    assert math.isclose(interval.optimum(5, mtbf), minutes, rel_tol=6e-3)


@given(costs, mtbfs)
def test_nothing_near_the_optimum_is_better(cost: float, mtbf: float) -> None:
    def lost(work: float) -> float:
        """Time a second of work takes with exponential failures, restarts aside; exact."""
        return mtbf * math.expm1((work + cost) / mtbf) / work

    if cost < mtbf / 20:
        best = interval.optimum(cost, mtbf)
        assert lost(best) <= 1.001 * min(lost(best * f) for f in (0.5, 0.8, 0.9, 1.1, 1.25, 2))


@given(costs, costs, mtbfs, mtbfs, st.floats(0, 1e3), st.floats(1, 1e5))
def test_more_cost_and_fewer_failures_make_saves_rarer(
    cost: float, other: float, mtbf: float, another: float, drain: float, longest: float
) -> None:
    (cheap, dear), (often, rare) = sorted((cost, other)), sorted((mtbf, another))
    # By the optimum only where saves cost less than there is between failures.
    if dear < often / 10:
        assert interval.optimum(cheap, often) <= interval.optimum(dear, often) * (1 + 1e-9)
    assert interval.optimum(cheap, often) <= interval.optimum(cheap, rare) * (1 + 1e-9)
    found = [interval.best(cheap, drain, m, longest).seconds for m in (often, rare)]
    assert found[0] <= found[1] * (1 + 1e-9)


@given(st.floats(0, 1e3), st.floats(0, 1e4), mtbfs, st.floats(1, 1e5))
def test_the_bounds_hold(cost: float, drain: float, mtbf: float, longest: float) -> None:
    best = interval.best(cost, drain, mtbf, longest)
    assert best.seconds >= max(10 * cost, 1.25 * drain) * (1 - 1e-9)
    assert best.seconds <= max(longest, 10 * cost, 1.25 * drain, 0.01) * (1 + 1e-9)
    if not best.bound:
        expected = max(cost, 1e-3)
        assert best.seconds == interval.optimum(expected, mtbf) + expected


@given(st.integers(0, 1000), st.floats(0, 1e9), st.integers(0, 4))
def test_the_rate_goes_by_what_has_been_seen(failures: int, seen: float, nearer: int) -> None:
    rate = interval.rate(failures, seen, nearer)
    assert rate > interval.rate(failures, seen + HOUR, nearer)
    assert rate < interval.rate(failures + 1, seen, nearer)
    assert rate > interval.rate(failures, seen, nearer + 1)
    # After a thousand node-days in which one has failed in ten, little is left of the prior.
    assert math.isclose(interval.rate(100, 1000 * 24 * HOUR, 0) * 24 * HOUR, 0.1, rel_tol=0.01)
    assert math.isclose(interval.rate(0, 0, 0), interval.PRIOR_RATE)


def test_a_little_more_or_less_changes_nothing() -> None:
    assert not interval.notable(600, 650)
    assert not interval.notable(650, 600)
    assert interval.notable(600, 900)
    assert interval.notable(900, 600)


# -- a simulation --------------------------------------------------------------------------------


def simulate(every: float | None, cost: float, mtbf: float, seed: int, work: float) -> float:
    """Seconds that ``work`` seconds of training take on 10 nodes; every=None finds it out."""
    chance = random.Random(seed)
    nodes, now, done, saved, failures = 10, 0.0, 0.0, 0.0, 0
    breaks = chance.expovariate(1 / mtbf)
    while done < work:
        seconds = every
        if seconds is None:
            rate = interval.rate(failures, now * nodes, 0) * nodes
            seconds = interval.best(cost, 0, 1 / rate, 1e9).seconds - cost
        stretch = min(seconds, work - done)
        if now + stretch + cost > breaks:
            now, done, failures = breaks, saved, failures + 1
            breaks = now + chance.expovariate(1 / mtbf)
            continue
        now += stretch + cost
        saved = done = done + stretch
    return now


@pytest.mark.parametrize(("cost", "mtbf"), [(30, 4 * HOUR), (5, 24 * HOUR), (60, HOUR)])
def test_auto_is_within_a_few_percent_of_the_best_fixed_interval(cost: float, mtbf: float) -> None:
    work, seeds = 100 * mtbf, range(8)
    best = interval.optimum(cost, mtbf)

    def total(every: float | None) -> float:
        return sum(simulate(every, cost, mtbf, seed, work) for seed in seeds)

    fixed = min(total(best * factor) for factor in (0.5, 0.7, 1.0, 1.4, 2.0))
    assert total(None) < 1.03 * fixed
    # A fifth of the best, and five times as much, are felt.
    assert min(total(best / 5), total(best * 5)) > max(total(None), 1.01 * fixed)


# -- what is remembered --------------------------------------------------------------------------

amounts = st.floats(0, 1e12)


@given(
    amounts,
    st.dictionaries(st.sampled_from(["files", "near 0"]), st.integers(0, 10**6)),
    st.dictionaries(st.sampled_from(["files", "near 0"]), st.builds(Habit, *[amounts] * 3)),
    st.booleans(),
)
def test_a_history_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    seconds: float,
    restores: dict[str, int],
    habits: dict[str, Habit],
    running: bool,
) -> None:
    folder = tmp_path_factory.mktemp("history")
    history = History(seconds, restores, habits, running)
    history.write(folder)
    assert History.read(folder) == history
    assert [entry.name for entry in folder.iterdir()] == [".history.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"node_seconds": 3',
        b"[]",
        b"null",
        b'"text"',
        b'{"node_seconds": "nan", "restores": {}, "habits": {}, "running": false}',
        b'{"node_seconds": -1, "restores": {}, "habits": {}, "running": false}',
        b'{"node_seconds": 1, "restores": 3, "habits": {}, "running": false}',
        b'{"node_seconds": 1, "restores": {}, "habits": {"files": 3}, "running": false}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_history_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".history.json").write_bytes(content)
    assert History.read(tmp_path) == History()


def test_only_a_start_after_no_orderly_end_is_a_failure() -> None:
    history = History()
    history.restored("files")
    assert history.restores == {}
    history.running = True
    history.restored("near 0")
    # Again, for another failure came while it was restored.
    history.restored("files")
    assert history.restores == {"near 0": 1}
