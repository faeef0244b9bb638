"""Tries torch.distributed over the backend hpcft and writes down what came of each trial.

``collectives.py OUT``: every rank writes ``OUT/<rank>.json``, trial -> "" or what went wrong.
The expected results are computed from the inputs of all ranks, which each rank can make itself.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import hpcft

TYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
]

job = hpcft.init()
RANK, SIZE = job.rank, job.size
ALL = range(SIZE)
trials: dict[str, Callable[[], None]] = {}


def trial(function: Callable[[], None]) -> Callable[[], None]:
    trials[function.__name__] = function
    return function


def given(rank: int, dtype: torch.dtype = torch.float32, count: int = 6) -> torch.Tensor:
    """What ``rank`` brings; small numbers, so that every type holds their sums exactly."""
    return (torch.arange(count) % 4 + rank + 1).to(dtype)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@trial
def all_reduce() -> None:
    for dtype in TYPES:
        for op, reduce in (
            (dist.ReduceOp.SUM, lambda x: x.sum(0)),
            (dist.ReduceOp.PRODUCT, lambda x: x.prod(0)),
            (dist.ReduceOp.MIN, lambda x: x.amin(0)),
            (dist.ReduceOp.MAX, lambda x: x.amax(0)),
        ):
            tensor = given(RANK, dtype)
            dist.all_reduce(tensor, op)
            same(tensor, reduce(torch.stack([given(r).double() for r in ALL])).to(dtype))


@trial
def all_reduce_averages() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = given(RANK, dtype) * SIZE
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        same(tensor, sum(given(r, dtype) for r in ALL))


@trial
def all_reduce_of_bits() -> None:
    for op, reduce in (
        (dist.ReduceOp.BAND, torch.bitwise_and),
        (dist.ReduceOp.BOR, torch.bitwise_or),
        (dist.ReduceOp.BXOR, torch.bitwise_xor),
    ):
        tensor = given(RANK, torch.int64)
        dist.all_reduce(tensor, op)
        expected = given(0, torch.int64)
        for r in ALL[1:]:
            expected = reduce(expected, given(r, torch.int64))
        same(tensor, expected)


@trial
def all_reduce_of_what_is_not_contiguous() -> None:
    base = torch.zeros(4, 6)
    base[:, ::2] = given(RANK, count=3)
    view = base[:, ::2]
    dist.all_reduce(view)
    same(view, sum(given(r, count=3) for r in ALL).expand(4, 3))
    same(base[:, 1::2], torch.zeros(4, 3))


@trial
def all_reduce_of_complex_numbers_of_none_and_of_a_scalar() -> None:
    number = torch.complex(given(RANK), given(RANK))
    dist.all_reduce(number)
    total = sum(given(r) for r in ALL)
    same(number, torch.complex(total, total))
    dist.all_reduce(torch.empty(0))
    scalar = torch.tensor(float(RANK))
    dist.all_reduce(scalar)
    same(scalar, torch.tensor(float(sum(ALL))))


@trial
def all_reduce_without_waiting() -> None:
    tensor = given(RANK)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    work.wait()
    same(tensor, sum(given(r) for r in ALL))
    future = dist.all_reduce(given(RANK), async_op=True).get_future()
    same(future.wait()[0], sum(given(r) for r in ALL))


@trial
def broadcast() -> None:
    for dtype in [*TYPES, torch.bool, torch.complex64, torch.float8_e4m3fn]:
        for root in ALL:
            tensor = given(RANK).to(dtype)
            dist.broadcast(tensor, root)
            same(tensor.view(torch.uint8), given(root).to(dtype).view(torch.uint8))
    parts = torch.zeros(6, 2)
    parts[:, 0] = given(RANK)
    dist.broadcast(parts[:, 0], 1)
    same(parts[:, 0], given(1))


@trial
def reduce() -> None:
    for dtype in TYPES:
        tensor = given(RANK, dtype)
        dist.reduce(tensor, 1)
        same(tensor, sum(given(r, dtype) for r in ALL) if RANK == 1 else given(RANK, dtype))


@trial
def all_gather() -> None:
    for dtype in [*TYPES, torch.bool, torch.complex64]:
        parts = [torch.zeros(6, dtype=dtype) for _ in ALL]
        dist.all_gather(parts, given(RANK).to(dtype))
        for r in ALL:
            same(parts[r], given(r).to(dtype))
        whole = torch.zeros(6 * SIZE, dtype=dtype)
        dist.all_gather_single(whole, given(RANK).to(dtype))
        same(whole, torch.cat([given(r).to(dtype) for r in ALL]))


@trial
def gather_and_scatter() -> None:
    parts = [torch.zeros(6) for _ in ALL] if RANK == 2 else None
    dist.gather(given(RANK), parts, 2)
    for r in ALL if parts else []:
        same(parts[r], given(r))
    mine = torch.zeros(6)
    dist.scatter(mine, [10 * given(r) for r in ALL] if RANK == 1 else None, 1)
    same(mine, 10 * given(RANK))


@trial
def reduce_scatter() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        expected = sum((r + 1) * given(RANK, dtype) for r in ALL)
        mine = torch.zeros(6, dtype=dtype)
        dist.reduce_scatter(mine, [(RANK + 1) * given(r, dtype) for r in ALL])
        same(mine, expected)
        whole = torch.cat([(RANK + 1) * given(r, dtype) for r in ALL])
        dist.reduce_scatter_single(mine, whole)
        same(mine, expected)
    dist.reduce_scatter_single(mine := torch.zeros(6), SIZE * whole.float(), dist.ReduceOp.AVG)
    same(mine, expected.float())


@trial
def all_to_all() -> None:
    got = [torch.zeros(6) for _ in ALL]
    dist.all_to_all(got, [10 * RANK + given(r) for r in ALL])
    for r in ALL:
        same(got[r], 10 * r + given(RANK))
    whole = torch.zeros(SIZE, 6)
    dist.all_to_all_single(whole, torch.stack([10 * RANK + given(r) for r in ALL]))
    same(whole, torch.stack([10 * r + given(RANK) for r in ALL]))
    # Rank r gives rank s s + 1 rows of r.
    sent = [s + 1 for s in ALL]
    rows = torch.full((sum(sent), 2), float(RANK))
    got_rows = torch.zeros((RANK + 1) * SIZE, 2)
    dist.all_to_all_single(got_rows, rows, [RANK + 1] * SIZE, sent)
    same(got_rows, torch.cat([torch.full((RANK + 1, 2), float(r)) for r in ALL]))


@trial
def from_one_to_another() -> None:
    after, before = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    got = torch.zeros(6)
    if RANK % 2:
        dist.recv(got, before)
        dist.send(given(RANK), after)
    else:
        dist.send(given(RANK), after)
        dist.recv(got, before)
    same(got, given(before))
    got.zero_()
    receiving = dist.irecv(got, before)
    dist.isend(given(RANK), after).wait()
    receiving.wait()
    same(got, given(before))
    got.zero_()
    swaps = [
        dist.P2POp(dist.isend, given(RANK), after),
        dist.P2POp(dist.irecv, got, before),
    ]
    for request in dist.batch_isend_irecv(swaps):
        request.wait()
    same(got, given(before))
    dist.barrier()


@trial
def objects() -> None:
    thing = {"rank": RANK, "text": "x" * 100 * (RANK + 1)}
    everything: list[object] = [None] * SIZE
    dist.all_gather_object(everything, thing)
    assert [t["rank"] for t in everything] == list(ALL)  # type: ignore[index]
    box = [thing]
    dist.broadcast_object_list(box, 1)
    assert box[0]["rank"] == 1
    mine: list[object] = [None]
    dist.scatter_object_list(mine, [f"for {r}" for r in ALL] if RANK == 0 else None, 0)
    assert mine == [f"for {RANK}"]
    gathered: list[object] | None = [None] * SIZE if RANK == 0 else None
    dist.gather_object(thing, gathered, 0)
    if gathered:
        assert [t["rank"] for t in gathered] == list(ALL)  # type: ignore[index]


@trial
def groups() -> None:
    everybody = dist.new_group()
    tensor = given(RANK)
    dist.all_reduce(tensor, group=everybody)
    same(tensor, sum(given(r) for r in ALL))
    some = dist.new_group([0, 2])
    if RANK in (0, 2):
        tensor = given(RANK)
        dist.all_reduce(tensor, group=some)
        same(tensor, given(0) + given(2))
        dist.broadcast(tensor, 2, group=some)


@trial
def functional_collectives() -> None:
    same(functional.all_reduce(given(RANK), "sum", dist.group.WORLD), sum(given(r) for r in ALL))
    whole = functional.all_gather_single(given(RANK), 0, dist.group.WORLD)
    same(whole, torch.cat([given(r) for r in ALL]))
    part = functional.reduce_scatter_single(whole, "sum", 0, dist.group.WORLD)
    same(part, SIZE * given(RANK))


@trial
def distributed_tensors() -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    whole = torch.arange(24.0).reshape(6, 4)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    same(sharded.to_local(), whole.chunk(SIZE)[RANK])
    same(sharded.redistribute(mesh, [Replicate()]).to_local(), whole)
    replicated = distribute_tensor(whole.T, mesh, [Replicate()])
    same((sharded @ replicated).full_tensor(), whole @ whole.T)


def network() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))


def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each rank's batch."""
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(4, 6, generator=generator), torch.randn(4, 3, generator=generator))
        for _ in ALL
    ]


def train(model: torch.nn.Module, mine: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        x, y = mine(step)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def alone() -> list[torch.Tensor]:
    """Parameters after training on the batches of all ranks, in one process."""

    def whole(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        parts = batches(step)
        return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])

    model = network()
    train(model, whole)
    return [p.detach() for p in model.parameters()]


@trial
def data_parallel() -> None:
    for how in ({}, {"find_unused_parameters": True}, {"static_graph": True}, {"bucket_cap_mb": 0}):
        model = DistributedDataParallel(network(), **how)
        train(model, lambda step: batches(step)[RANK])
        for got, expected in zip(model.parameters(), alone(), strict=True):
            torch.testing.assert_close(got.detach(), expected)


@trial
def data_parallel_accumulating_gradients() -> None:
    model, reference = DistributedDataParallel(network()), network()
    for step in range(3):
        x, y = batches(step)[RANK]
        if step < 2:
            with model.no_sync():
                torch.nn.functional.mse_loss(model(x), y).backward()
        else:
            torch.nn.functional.mse_loss(model(x), y).backward()
        for x, y in batches(step):
            (torch.nn.functional.mse_loss(reference(x), y) / SIZE).backward()
    for got, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


@trial
def fully_sharded() -> None:
    model = network()
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    train(model, lambda step: batches(step)[RANK])
    for got, expected in zip(model.parameters(), alone(), strict=True):
        assert isinstance(got, DTensor)
        torch.testing.assert_close(got.full_tensor().detach(), expected)


@trial
def an_operation_mpi_lacks_is_refused() -> None:
    scaled = dist._make_nccl_premul_sum(2.0)
    with pytest.raises(Exception, match="cannot reduce"):
        dist.all_reduce(given(RANK), scaled)


results: dict[str, str] = {}
for name, function in trials.items():
    try:
        function()
    except Exception:
        results[name] = traceback.format_exc()
    else:
        results[name] = ""
    dist.barrier()
Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(results))
