"""No sample is lost or seen twice, whatever becomes of the ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import HpcftError
from hpcft.train.partition import permutation, share
from hpcft.train.sampler import ElasticBatchSampler


@given(st.integers(0, 1000), st.integers(1, 40))
def test_shares_cover_everything_once(count: int, ranks: int) -> None:
    bounds = [share(count, rank, ranks) for rank in range(ranks)]
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(count))
    sizes = [stop - start for start, stop in bounds]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_that_all_agree_on(size: int, epoch: int, seed: int) -> None:
    order = permutation(size, epoch, seed, True)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == permutation(size, epoch, seed, True).tolist()


@given(st.data())
def test_every_sample_once_an_epoch_through_any_failures(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 6), "ranks")
    batch_size = data.draw(st.integers(1, 4), "batch_size")
    size = data.draw(st.integers(ranks * batch_size, 120), "size")
    drop_last = data.draw(st.booleans(), "drop_last")
    keep = data.draw(st.sampled_from([None, ranks * batch_size]), "global_batch")
    samplers = [
        ElasticBatchSampler(size, batch_size, seed=3, drop_last=drop_last) for _ in range(ranks)
    ]

    def place() -> None:
        for rank, sampler in enumerate(samplers):
            sampler.place(rank, len(samplers), keep)

    place()
    seen: list[int] = []
    while samplers[0].epoch == 0:
        # Everybody reads some batches ahead, of which only the first is committed.
        count = samplers[0].global_count
        batches = [next(iter(sampler)) for sampler in samplers]
        assert [len(batch) for batch in batches] == [s.local_count for s in samplers]
        assert sum(map(len, batches)) == count
        assert all(batches)
        if len(samplers) > 1 and data.draw(st.booleans(), "failure"):
            # The step is not committed; a rank is lost, and the others go on from the position.
            lost = data.draw(st.integers(0, len(samplers) - 1))
            position = samplers[0].state_dict()
            del samplers[lost]
            for sampler in samplers:
                sampler.load_state_dict(position)
            place()
            continue
        seen += [i for batch in batches for i in batch]
        for sampler in samplers:
            sampler.advance()
    assert len(set(seen)) == len(seen)
    left = size - len(seen)
    largest = keep or ranks * batch_size
    assert left < (largest if drop_last else ranks)


@given(st.data())
def test_what_late_ranks_did_not_bring_in_comes_again_in_the_epoch(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 5), "ranks")
    batch_size = data.draw(st.integers(1, 3), "batch_size")
    size = data.draw(st.integers(ranks * batch_size, 90), "size")
    drop_last = data.draw(st.booleans(), "drop_last")
    samplers = [ElasticBatchSampler(size, batch_size, drop_last=drop_last) for _ in range(ranks)]
    for rank, sampler in enumerate(samplers):
        sampler.place(rank, ranks)
    learnt: list[int] = []
    while samplers[0].epoch == 0:
        batches = [next(iter(sampler)) for sampler in samplers]
        taken = data.draw(st.sets(st.integers(0, ranks - 1), min_size=1), "taken")
        counts = [len(batches[rank]) for rank in sorted(taken)]
        assert sum(counts) == samplers[0].count_of(taken)
        learnt += [i for rank in sorted(taken) for i in batches[rank]]
        for sampler in samplers:
            sampler.advance(taken)
        # Who was late goes on from another's position.
        for rank in set(range(ranks)) - taken:
            samplers[rank].load_state_dict(samplers[min(taken)].state_dict())
    assert len(set(learnt)) == len(learnt)
    assert size - len(learnt) < (ranks * batch_size if drop_last else ranks)
    again = next(iter(samplers[0]))
    assert again
    assert {s.epoch for s in samplers} == {1}


def test_passes_over_what_was_left_have_the_order_of_the_epoch() -> None:
    first, second = (ElasticBatchSampler(12, 2, shuffle=False) for _ in range(2))
    first.place(0, 2)
    second.place(1, 2)
    for taken in ([0], [0, 1], [1]):
        for sampler in (first, second):
            sampler.advance(taken)
    assert (first.epoch, len(first)) == (0, 1)
    assert [list(first), list(second)] == [[[2, 3]], [[8, 9]]]
    for sampler in (first, second):
        sampler.advance()
    assert (first.epoch, len(first)) == (1, 3)
    assert first.state_dict() == {"epoch": 1, "consumed": 0}


def test_an_adopted_rank_continues_at_the_committed_position() -> None:
    survivor, spare = ElasticBatchSampler(50, 5), ElasticBatchSampler(50, 5)
    for sampler in (survivor, spare):
        sampler.place(0, 2)
    survivor.advance()
    expected = next(iter(survivor))
    spare.load_state_dict(survivor.state_dict())
    assert next(iter(spare)) == expected
    assert len(spare) == 4


def test_too_few_samples_are_told() -> None:
    with pytest.raises(HpcftError, match="no global batch"):
        ElasticBatchSampler(5, 3).place(0, 2)
