"""Sharing the batch out by speed: whole, in proportion, the same in all ranks."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.train.partition import share
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.shares import Plan, Speed, better, counts

WEIGHTS = st.lists(st.integers(1, 2000), min_size=1, max_size=20).map(tuple)


@given(st.data(), WEIGHTS)
def test_a_batch_is_shared_out_whole_and_in_proportion(
    data: st.DataObject, weights: tuple[int, ...]
) -> None:
    ranks = len(weights)
    count = data.draw(st.integers(ranks, 5000))
    shared = counts(count, weights)
    assert sum(shared) == count
    assert min(shared) >= 1
    exact = [count * weight / sum(weights) for weight in weights]
    if min(exact) >= 1:
        assert all(abs(a - b) < 1 for a, b in zip(shared, exact, strict=True))
    # Who is faster has no less.
    ordered = sorted(zip(weights, shared, strict=True))
    assert all(a[1] <= b[1] + 1 for a, b in pairwise(ordered))
    bounds = [share(count, rank, ranks, weights) for rank in range(ranks)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))


@given(st.integers(1, 20), st.integers(1, 50))
def test_equal_weights_are_even_shares(ranks: int, each: int) -> None:
    assert counts(ranks * each, (1000,) * ranks) == (each,) * ranks


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="one for each of 3"):
        counts(2, (1, 1, 1))


def speeds(samples: list[int], each: list[float]) -> list[Speed]:
    return [Speed(n * one, n, (0, 0)) for n, one in zip(samples, each, strict=True)]


def test_the_batch_is_shared_out_by_speed() -> None:
    weights = better(speeds([32, 32], [0.001, 0.002]))
    assert weights is not None
    assert counts(64, weights) == (43, 21)
    # And then there is nothing to improve.
    assert better(speeds([43, 21], [0.001, 0.002])) is None


@given(
    st.lists(st.floats(0.0005, 0.01), min_size=2, max_size=12),
    st.integers(4, 64),
    st.floats(0, 0.02),
)
def test_steps_only_become_shorter_and_the_shares_come_to_rest(
    each: list[float], batch: int, overhead: float
) -> None:
    """Of ranks whose steps take some time whatever their share."""
    shared = (batch,) * len(each)
    longest = max(overhead + n * one for n, one in zip(shared, each, strict=True))
    for _ in range(60):
        took = [overhead + n * one for n, one in zip(shared, each, strict=True)]
        assert max(took) <= longest * 1.000001
        longest = max(took)
        found = better([Speed(t, n, (0, 0)) for t, n in zip(took, shared, strict=True)])
        if found is None:
            return
        shared = counts(batch * len(each), found)
        assert sum(shared) == batch * len(each)
    raise AssertionError("the shares do not come to rest")


@pytest.mark.parametrize("bad", [[Speed(0.0, 4, (0, 0))] * 2, [Speed(1.0, 0, (0, 0))] * 2])
def test_what_says_nothing_changes_nothing(bad: list[Speed]) -> None:
    assert better(bad) is None


def test_a_plan_changes_at_its_places() -> None:
    plan = Plan().changed((1, 2), (3, 64), (3, 0)).changed((2, 1), (3, 96), (3, 32))
    assert plan.at((3, 63)) == ()
    assert plan.at((3, 64)) == (1, 2)
    assert plan.at((3, 96)) == plan.at((4, 0)) == (2, 1)
    assert Plan.of(plan.as_numbers()) == plan
    assert plan.fits(2)
    assert not plan.fits(3)
    # What is over is forgotten.
    assert plan.changed((5, 6), (4, 32), (4, 0)).stages == (((3, 96), (2, 1)), ((4, 32), (5, 6)))


@given(st.data())
def test_every_sample_once_an_epoch_through_changes_of_shares_and_failures(
    data: st.DataObject,
) -> None:
    ranks = data.draw(st.integers(2, 5), "ranks")
    batch_size = data.draw(st.integers(1, 4), "batch_size")
    size = data.draw(st.integers(2 * ranks * batch_size, 150), "size")
    drop_last = data.draw(st.booleans(), "drop_last")
    samplers = [
        ElasticBatchSampler(size, batch_size, seed=3, drop_last=drop_last) for _ in range(ranks)
    ]

    def place() -> None:
        for rank, sampler in enumerate(samplers):
            sampler.place(rank, ranks)

    place()
    # As a loader with workers, each reads ahead as far as it likes.
    ahead = [data.draw(st.integers(1, 4), "ahead") for _ in range(ranks)]
    loaders = [iter(sampler) for sampler in samplers]
    waiting: list[list[list[int]]] = [[] for _ in range(ranks)]
    seen: list[int] = []
    while samplers[0].epoch == 0:
        for loader, queue, depth in zip(loaders, waiting, ahead, strict=True):
            queue.extend(batch for _, batch in zip(range(depth - len(queue)), loader, strict=False))
        count = samplers[0].global_count
        batches = [queue.pop(0) for queue in waiting]
        assert [len(batch) for batch in batches] == [s.local_count for s in samplers]
        assert sum(map(len, batches)) == count
        assert len({s.global_count for s in samplers}) == 1
        happens = data.draw(st.sampled_from(["nothing", "shares", "failure", "restart"]))
        if happens == "failure":
            # Some have committed the step, and give their state to the others; or nobody has.
            if data.draw(st.booleans(), "committed"):
                samplers[0].advance()
                seen += [i for batch in batches for i in batch]
                state = samplers[0].state_dict()
                for sampler in samplers[1:]:
                    sampler.load_state_dict(state)
            place()
            loaders, waiting = [iter(sampler) for sampler in samplers], [[] for _ in range(ranks)]
            continue
        seen += [i for batch in batches for i in batch]
        for sampler in samplers:
            sampler.advance()
        if happens == "restart":
            state = samplers[-1].state_dict()
            samplers = [
                ElasticBatchSampler(size, batch_size, seed=3, drop_last=drop_last)
                for _ in range(ranks)
            ]
            for sampler in samplers:
                sampler.load_state_dict(state)
            place()
            loaders, waiting = [iter(sampler) for sampler in samplers], [[] for _ in range(ranks)]
        if happens == "shares":
            weights = tuple(data.draw(st.integers(100, 2000), "weight") for _ in range(ranks))
            since = max(sampler.read for sampler in samplers)
            for sampler in samplers:
                sampler.share_out(weights, since)
    assert len(set(seen)) == len(seen)
    left = size - len(seen)
    assert left < (ranks * batch_size if drop_last else ranks)


def test_shares_of_other_ranks_are_forgotten_and_without_any_the_state_is_as_ever() -> None:
    sampler = ElasticBatchSampler(100, 4)
    sampler.place(0, 2)
    assert sampler.state_dict() == {"epoch": 0, "consumed": 0}
    sampler.share_out((1500, 500), (0, 0))
    assert sampler.local_count == 6
    sampler.advance()
    state = sampler.state_dict()
    for ranks, expected in ((2, 6), (3, 4)):
        other = ElasticBatchSampler(100, 4)
        other.load_state_dict(state)
        other.place(0, ranks)
        assert other.local_count == expected


def test_a_change_that_nobody_has_committed_is_undone() -> None:
    sampler = ElasticBatchSampler(100, 4)
    sampler.place(0, 2)
    sampler.share_out((1500, 500), (0, 0))
    sampler.place(0, 2)
    assert sampler.local_count == 4
