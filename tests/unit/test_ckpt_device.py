"""What the engine cannot reach by itself: loans of its pool, and the ferries that fill them.

The tensors are in host memory here, and treated as if nobody but torch could reach them; what needs
a GPU is in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import nn

from hpcft.ckpt import device
from hpcft.ckpt._engine import ELSEWHERE, Engine, crc32c
from hpcft.ckpt.device import Ferry, Landing
from hpcft.ckpt.files import OpenFile
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Save, SaveFailed, Saver
from hpcft.ckpt.store import Store
from hpcft.train.state import State

MIB = 1 << 20


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All tensors are."""
    monkeypatch.setattr(device, "is_elsewhere", lambda tensor: tensor.device.type != "meta")
    return


def some(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8)


def complete(saving: Save) -> None:
    saving.wait_copied()
    while not saving.advance():
        pass
    saving.finish()


def test_more_than_the_pool_holds_goes_through_it(tmp_path: Path) -> None:
    engine = Engine(2 * MIB, chunk=MIB)
    # One after the other, at odd places; some for the ferry, some for the engine's own threads.
    whole = [some(n) for n in (3 * MIB + 5, 100, 5 * MIB, 4096)]
    memories = [t if i % 2 == 0 else t.numpy() for i, t in enumerate(whole)]
    ends = [sum(map(len, whole[: i + 1])) for i in range(len(whole))]
    extents = [(end - len(t), len(t)) for end, t in zip(ends, whole, strict=True)]

    def listed(memories: list[Any]) -> list[tuple[object, int, int, int]]:
        return [
            (device.for_engine(memory), 0, offset + 17, length)
            for memory, (offset, length) in zip(memories, extents, strict=True)
        ]

    ferry = Ferry(engine, memories, writing=True)
    with OpenFile.for_writing(tmp_path / "f") as file:
        writing = engine.write([file.for_engine], listed(memories))
    ferry.run(writing)
    assert ferry.error is None
    assert writing.wait_copied(0)
    assert writing.wait(60)
    assert (tmp_path / "f").read_bytes()[17:] == torch.cat(whole).numpy().tobytes()
    assert writing.checksums() == [crc32c(tensor.numpy()) for tensor in whole]

    back = [torch.zeros_like(tensor) for tensor in whole]
    # The other half this time.
    rooms = [t if i % 2 else t.numpy() for i, t in enumerate(back)]
    with OpenFile.for_reading(tmp_path / "f") as file:
        spans = [(m, 0, offset + 17, n) for m, (offset, n) in zip(rooms, extents, strict=True)]
        reading = Landing(engine).read([file.for_engine], spans)
    assert reading.wait(60)
    assert all(map(torch.equal, back, whole))
    assert reading.checksums() == writing.checksums()
    assert engine.peak <= 2 * MIB


def test_a_loan_that_is_lost_breaks_the_transfer_off(tmp_path: Path) -> None:
    engine = Engine(2 * MIB, chunk=MIB)
    for writing in (True, False):
        (tmp_path / "f").write_bytes(bytes(4 * MIB))
        begin = engine.write if writing else engine.read
        with OpenFile.for_writing(tmp_path / "f") as file:
            transfer = begin([file.for_engine], [(ELSEWHERE, 0, 0, 4 * MIB)])
        loan = transfer.borrow(60)
        assert loan is not None
        [(extent, _, place, length)] = loan.pieces
        assert (extent, place, length) == (0, 0, MIB)
        assert len(memoryview(loan)) == MIB
        if writing:
            # The other chunk; a third there is not.
            other = transfer.borrow(60)
            assert other is not None
            with pytest.raises(TimeoutError):
                transfer.borrow(0)
            other.give_back()
            with pytest.raises(ValueError, match="given back"):
                memoryview(other)
        del loan
        assert transfer.borrow(60) is None
        with pytest.raises(InterruptedError):
            transfer.wait(60)
    # All chunks are there again.
    data = some(4 * MIB).numpy()
    with OpenFile.for_writing(tmp_path / "f") as file:
        assert engine.write([file.for_engine], [(data, 0, 0, 4 * MIB)]).wait(60)


def training() -> State:
    torch.manual_seed(7)
    module = nn.Sequential(
        nn.Linear(300, 400),
        nn.BatchNorm1d(400),
        nn.Linear(400, 5).bfloat16(),
        nn.Conv2d(8, 64, 9).to(memory_format=torch.channels_last),
    )
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return State(module=module, optimizer=optimizer, seen=3)


def same(a: State, b: State) -> bool:
    one, two = a.take_apart(), b.take_apart()
    return (
        one.skeleton["values"] == two.skeleton["values"]
        and len(one.tensors) == len(two.tensors)
        and all(map(torch.equal, one.tensors, two.tensors))
    )


@pytest.mark.parametrize("fresh", [False, True], ids=["moments there", "no moments yet"])
def test_a_state_is_restored_into_the_tensors_it_has(
    elsewhere: None, tmp_path: Path, fresh: bool
) -> None:
    state, engine, store = training(), Engine(2 * MIB, chunk=MIB), Store(tmp_path)
    complete(Saver(store, Alone(), engine).begin(3, state.to_tree(frozen=False)))
    other = training()
    if fresh:
        other.optimizer.state.clear()
    with torch.no_grad():
        for tensor in other.take_apart().tensors:
            tensor.zero_()
    before = [parameter.data_ptr() for parameter in other.module.parameters()]
    moments = [moment["exp_avg"].data_ptr() for moment in other.optimizer.state.values()]
    other.from_tree(*load(store.committed()[-1].state, engine, target=other.targets()))
    assert [parameter.data_ptr() for parameter in other.module.parameters()] == before
    if not fresh:
        after = [moment["exp_avg"].data_ptr() for moment in other.optimizer.state.values()]
        assert after == moments
    assert same(state, other)
    assert engine.peak <= 2 * MIB
    # It is an ordinary file.
    with h5py.File(store.committed()[-1].state) as file:
        weight = torch.from_numpy(file["module/0.weight"][:])
    assert torch.equal(weight, state.module[0].weight)


def test_what_comes_after_the_copying_is_not_saved(elsewhere: None, tmp_path: Path) -> None:
    # So slow, and the pool so small, that most is copied only while this waits for it.
    engine = Engine(MIB, chunk=MIB // 4, bandwidth=8 * MIB)
    store, tensor = Store(tmp_path), torch.randn(MIB // 2)
    expected = tensor.clone()
    saving = Saver(store, Alone(), engine).begin(1, {"model": {"t": tensor}})
    saving.wait_copied(in_order=True)
    tensor.zero_()
    complete(saving)
    _, back = load(store.committed()[-1].state, engine)
    assert torch.equal(back["model"]["t"], expected)
    assert engine.peak <= MIB


def test_a_device_that_fails_fails_the_save_and_no_other(
    elsewhere: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, store = Engine(2 * MIB, chunk=MIB), Store(tmp_path)
    saver, state = Saver(store, Alone(), engine), {"model": {"t": torch.randn(MIB)}}
    copy, copies = device._Lane.copy, []

    def fail(self: Any, into: torch.Tensor, data: torch.Tensor) -> None:
        copies.append(1)
        # To shapes that do not fit torch says what it says.
        copy(self, into, data[:-1] if len(copies) == 3 else data)

    monkeypatch.setattr(device._Lane, "copy", fail)
    saving = saver.begin(1, state)
    with pytest.raises(SaveFailed, match="must match the size"):
        complete(saving)
    assert store.committed() == []
    complete(saver.begin(2, state))
    assert [checkpoint.step for checkpoint in store.committed()] == [2]


def test_a_file_that_ends_early_is_damaged(elsewhere: None, tmp_path: Path) -> None:
    engine = Engine(2 * MIB, chunk=MIB)
    (tmp_path / "f").write_bytes(bytes(5 * MIB))
    with OpenFile.for_reading(tmp_path / "f") as file:
        reading = Landing(engine).read([file.for_engine], [(torch.empty(6 * MIB), 0, 0, 6 * MIB)])
        with pytest.raises(EOFError):
            reading.wait(60)


def test_a_damaged_leaf_is_noticed_where_it_comes_to_lie(elsewhere: None, tmp_path: Path) -> None:
    engine, store = Engine(2 * MIB, chunk=MIB), Store(tmp_path)
    tensor = torch.randn(MIB)
    complete(Saver(store, Alone(), engine).begin(1, {"model": {"t": tensor}}))
    path = store.committed()[-1].state
    with h5py.File(path) as file:
        place = file["model/t"].id.get_offset()
    with path.open("r+b") as raw:
        raw.seek(place + 2 * MIB)
        raw.write(b"damage")
    with pytest.raises(Damaged, match="model/t"):
        load(path, engine, target=lambda keys, spec: torch.empty_like(tensor))
