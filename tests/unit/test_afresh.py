"""Torch after a script, for the next run of it."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hpcft.train import afresh
from hpcft.train.process_group import WorldProcessGroup, install
from hpcft.world.progress import Progress

WHOLE = torch.arange(24.0).reshape(8, 3)


def cut_as(rank: int, size: int) -> list[torch.Tensor]:
    """What a rank makes of a tensor, in ways that need no other rank."""
    group = WorldProcessGroup(rank, size, Progress.create())
    group.park(rank, size)
    install(group)
    mesh = init_device_mesh("cpu", (size,))
    replicated = DTensor.from_local(WHOLE.clone(), mesh, [Replicate()], run_check=False)
    doubled = replicated + replicated
    moved = doubled.redistribute(mesh, [Shard(0)])
    flat = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))
    cut = distribute_tensor(WHOLE.clone(), flat, [Replicate(), Shard(0)], src_data_rank=None)
    product = (doubled @ replicated.T).redistribute(mesh, [Shard(1)])
    return [t.to_local().clone() for t in (moved, cut + cut, product)]


@pytest.mark.parametrize("before", [(3, 4), (0, 4), (1, 2)])
def test_a_rank_of_a_new_mesh_is_not_taken_for_the_rank_it_was(before: tuple[int, int]) -> None:
    try:
        cut_as(*before)
        afresh.forget()
        assert not dist.is_initialized()
        moved, cut, product = cut_as(1, 4)
    finally:
        afresh.forget()
    assert torch.equal(moved, 2 * WHOLE[2:4])
    assert torch.equal(cut, 2 * WHOLE[4:])
    assert torch.equal(product, (2 * WHOLE @ WHOLE.T)[:, 2:4])


def test_random_numbers_are_as_unknown_as_in_a_new_process() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.random()), float(torch.rand(1))

    def seed() -> None:
        random.seed(5)
        numpy.random.seed(5)
        torch.manual_seed(5)

    seed()
    first = draw()
    seed()
    afresh.forget()
    assert all(a != b for a, b in zip(first, draw(), strict=True))
