"""Averages of local SGD, over a group whose sum a test decides, and the vector they travel in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from torch import nn

from hpcft.train.flat import Flat
from hpcft.train.modes.local_sgd import Averaging
from hpcft.train.process_group import WorldProcessGroup
from hpcft.train.state import State
from hpcft.world.progress import Progress

SHAPES = st.lists(
    st.tuples(
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        st.lists(st.integers(0, 3), max_size=3),
    ),
    max_size=5,
)


@given(SHAPES)
def test_a_vector_has_all_values_and_brings_them_back(
    shapes: list[tuple[torch.dtype, list[int]]],
) -> None:
    tensors = [torch.ones(shape).to(dtype) * (n + 1) for n, (dtype, shape) in enumerate(shapes)]
    flat = Flat(tensors)
    vector = flat.read(flat.empty())
    floating = [t for t in tensors if t.is_floating_point()]
    assert vector.tolist() == [value for t in floating for value in t.flatten().tolist()]
    flat.write(vector * 2)
    for n, tensor in enumerate(tensors):
        assert (tensor == (n + 1) * (2 if tensor.is_floating_point() else 1)).all()
    assert flat.lossy == any(t.dtype == torch.bfloat16 for t in floating)


def test_float64_keeps_its_precision() -> None:
    flat = Flat([torch.ones(1), torch.full((1,), 1 + 1e-12, dtype=torch.float64)])
    assert flat.read(flat.empty())[1].item() == 1 + 1e-12


@pytest.fixture
def state() -> State:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(4.0)
    return State(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1))


def sgd(state: State, every: int, elastic: float) -> tuple[Averaging, WorldProcessGroup]:
    group = WorldProcessGroup(0, 2, Progress.create())
    # A parked group adds nothing to what this rank puts in: the others hold zeros.
    group.park(0, 2)
    return Averaging(group, every, elastic, state), group


def values(state: State) -> set[float]:
    return {v for p in state.model.parameters() for v in p.flatten().tolist()}


def test_it_averages_every_so_many_steps_by_the_samples(state: State) -> None:
    local, _ = sgd(state, 3, 1.0)
    for own, everybody in ((1, 2), (1, 2), (2, 4)):
        state.step += 1
        before = values(state)
        local.stepped(own, everybody)
        if state.step < 3:
            assert values(state) == before == {4.0}
    assert values(state) == {2.0}
    state.step += 1
    local.stepped(3, 4)
    local.average()
    # Three of the four samples since were this rank's.
    assert values(state) == {1.5}
    # All hold the average already.
    local.average()
    assert values(state) == {1.5}


def test_elastic_moves_a_part_of_the_way(state: State) -> None:
    local, _ = sgd(state, 1, 0.25)
    state.step += 1
    local.stepped(1, 2)
    assert values(state) == {3.5}
    # What is saved is the average itself.
    local.average()
    assert values(state) == {1.75}


def test_an_average_that_a_failure_cuts_short_changes_nothing(state: State) -> None:
    local, group = sgd(state, 1, 1.0)
    group.failure = MPI.Exception(MPI.ERR_PROC_FAILED)
    state.step += 1
    local.stepped(1, 2)
    assert values(state) == {4.0}
