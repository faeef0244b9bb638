"""What needs a GPU: streams, pinned memory, the bound on memory, random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpcft.ckpt import device
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Save, Saver
from hpcft.ckpt.store import Store
from hpcft.train.accelerator import in_use
from hpcft.train.state import State
from hpcft.train.works import completed

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

MIB = 1 << 20


def complete(saving: Save) -> None:
    saving.wait_copied()
    while not saving.advance():
        pass
    saving.finish()


def training() -> State:
    torch.manual_seed(7)
    module = nn.Sequential(
        nn.Linear(3000, 2000),
        nn.BatchNorm1d(2000),
        nn.Linear(2000, 500).bfloat16(),
        nn.Conv2d(8, 64, 9).to(memory_format=torch.channels_last),
    ).cuda()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return State(module=module, optimizer=optimizer, seen=3)


def copies(state: State) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in state.take_apart().tensors]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("pool", [2 * MIB, 256 * MIB], ids=["small pool", "large pool"])
def test_a_step_that_follows_at_once_is_not_in_what_is_saved(tmp_path: Path, pool: int) -> None:
    engine, store, state = Engine(pool, chunk=MIB), Store(tmp_path), training()
    expected = copies(state)
    saving = Saver(store, Alone(), engine).begin(2, state.to_tree(frozen=True))
    assert engine.pin is not None
    saving.wait_copied(in_order=True)
    state.optimizer.step()
    with torch.no_grad():
        for buffer in state.buffers():
            buffer.zero_()
    complete(saving)
    assert not same(copies(state), expected)
    other = training()
    before = torch.cuda.memory_allocated()
    other.from_tree(*load(store.committed()[-1].state, engine, target=other.targets()))
    # Into what was there: no second copy on the GPU.
    assert torch.cuda.memory_allocated() <= before + MIB
    assert same(copies(other), expected)
    assert engine.peak <= pool


def test_a_save_is_seen_by_the_stream_that_trains(tmp_path: Path) -> None:
    engine, store = Engine(64 * MIB, chunk=MIB), Store(tmp_path)
    training_stream = torch.cuda.Stream()
    with torch.cuda.stream(training_stream):
        tensor = torch.zeros(8 * MIB, device="cuda")
        torch.cuda._sleep(500_000_000)
        tensor += 1
        saving = Saver(store, Alone(), engine).begin(1, {"model": {"t": tensor}})
        saving.wait_copied(in_order=True)
        tensor += 1
    complete(saving)
    _, back = load(store.committed()[-1].state, engine)
    assert back["model"]["t"].unique().tolist() == [1]


def test_the_pool_is_pinned_once_and_let_go(tmp_path: Path) -> None:
    engine = Engine(8 * MIB, chunk=MIB)
    here = torch.device("cuda", torch.cuda.current_device())
    device.pin(engine, here)
    pin = engine.pin
    device.pin(engine, here)
    assert engine.pin is pin
    engine.close()
    again = Engine(8 * MIB, chunk=MIB)
    device.pin(again, here)
    assert again.pin is not None


def test_a_future_waits_for_what_its_stream_was_given() -> None:
    tensor = torch.zeros(MIB, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        tensor += 1
        future = completed([tensor])
    future.wait()
    assert tensor.sum().item() == MIB


def test_random_numbers_of_the_gpu_are_seeded() -> None:
    module: Any = in_use()
    assert module is torch.cuda
    drawn = []
    for _ in range(2):
        module.manual_seed_all(5)
        drawn.append(torch.rand(9, device="cuda"))
    assert torch.equal(*drawn)
