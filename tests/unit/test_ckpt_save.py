"""Checkpoints of a process by itself: what is saved comes back, or is said to be damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcft.ckpt import layout, plan, tree
from hpcft.ckpt._engine import Engine, crc32c
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Save, SaveFailed, Saver
from hpcft.ckpt.spec import Spec
from hpcft.ckpt.store import Store
from hpcft.ckpt.tree import Unstorable
from hpcft.errors import HpcftError

ENGINE = Engine(4 << 20, chunk=1 << 20)


def save(store: Store, state: dict[str, Any], step: int = 1, saver: Saver | None = None) -> Path:
    """Save, wait, and return the committed file."""
    complete((saver or Saver(store, Alone(), ENGINE)).begin(step, state))
    return store.committed()[-1].state


def complete(saving: Save) -> None:
    saving.wait_copied()
    while not saving.advance():
        pass
    saving.finish()


DTYPES = [
    *(torch.float16, torch.float32, torch.float64, torch.bfloat16),
    *(torch.float8_e5m2, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int16, torch.int64),
    *(torch.bool, torch.complex64),
]


def example() -> dict[str, Any]:
    torch.manual_seed(3)
    tensors: dict[str, Any] = {str(d): (torch.randn(3, 5) * 3).to(d) for d in DTYPES}
    tensors |= {
        "large": torch.randn(300, 200),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "across": torch.randn(40, 60).t(),
        "bits across": torch.randn(40, 60).bfloat16().t().requires_grad_(),
        "conjugate": torch.randn(5, dtype=torch.complex64).conj(),
        "negative": torch.randn(5, dtype=torch.complex64).conj().imag,
    }
    return {
        "model": tensors,
        "optim": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}, 7: {}},
            "param_groups": [
                {"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 7], "foreach": None}
            ],
        },
        "values": {
            "text": "häx\0\ud800",
            "no text": "",
            "raw": b"\0\1",
            "yes": True,
            "none": None,
            "big": 1 << 80,
            "negative": -(1 << 70),
            "nan": float("nan"),
            "list": [1, "a", [2.0]],
            "a/b": {".": 1, "": 2, "%2F": 3},
            "array": np.arange(6, dtype=">i2").reshape(2, 3),
            "ints": [1, 2],
            "nothing": [],
            "tuple": (),
            "bools": [True, False],
        },
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        plain = [x.detach().resolve_conj().resolve_neg() for x in (a, b)]
        raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in plain]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype.newbyteorder("=") == b.dtype and bool((a == b).all())
    if isinstance(a, dict):
        keys = isinstance(b, dict) and list(a) == list(b)
        return keys and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_all_that_can_be_saved_comes_back(tmp_path: Path) -> None:
    state = example()
    file = save(Store(tmp_path), state, step=12)
    step, back = load(file, ENGINE)
    assert step == 12
    assert same(state, back)


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=50),
)
trees = st.dictionaries(
    st.text().filter(lambda key: key != "hpcft"),
    st.recursive(
        plain,
        lambda inner: st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(st.text(), inner, max_size=4),
            st.dictionaries(st.integers(), inner, max_size=4),
        ),
        max_leaves=12,
    ),
    max_size=5,
)


@given(trees)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_plain_tree_comes_back(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    assert same(state, load(save(Store(folder).create(), state), ENGINE)[1])
    shutil.rmtree(folder)


def test_h5py_reads_it_with_names_types_and_checksums(tmp_path: Path) -> None:
    state = example()
    file = save(Store(tmp_path), state)
    raw = file.read_bytes()
    seen = 0
    with h5py.File(file) as content:
        for key, tensor in state["model"].items():
            dataset = content[f"model/{key}"]
            assert dataset.shape == tuple(tensor.shape)
            if "float8_e4m3fn" in key:
                assert dataset.attrs["dtype"] == b"float8_e4m3fn"
                continue
            narrow = tensor.dtype in (torch.bfloat16, torch.float8_e5m2)
            wide = tensor.float() if narrow else tensor
            assert (dataset[()] == wide.numpy(force=True)).all()
        assert content["optim/param_groups/0/lr"][()] == 1e-3
        assert content["values/raw"][()].tobytes() == b"\0\1"
        assert content["values/yes"][()]

        def check(name: str, item: Any) -> None:
            nonlocal seen
            if isinstance(item, h5py.Dataset) and item.size:
                begin, length = item.id.get_offset(), item.id.get_storage_size()
                assert item.attrs["crc32c"] == crc32c(raw[begin : begin + length]), name
                seen += 1

        content.visititems(check)
    assert seen > 30


def test_the_hdf5_tools_read_it(tmp_path: Path) -> None:
    file = save(Store(tmp_path), {"model": {"w": torch.tensor([1.5, -2]).bfloat16()}, "name": "é"})
    listed = subprocess.run(["h5ls", "-r", file], capture_output=True, text=True, check=True).stdout
    assert "/model/w                 Dataset {2}" in listed
    dumped = subprocess.run(
        ["h5dump", "-d", "/model/w", file], capture_output=True, text=True, check=True
    ).stdout
    assert "(0): 1.5, -2" in dumped


def test_saving_again_needs_no_new_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    saver = Saver(store, Alone(), ENGINE)
    state = {"w": torch.zeros(100_000), "lr": 0.1}
    save(store, state, 1, saver)
    made: list[int] = []
    monkeypatch.setattr(layout, "make", lambda specs: made.append(1))
    state["lr"] = 0.2
    state["w"] += 1
    file = save(store, state, 2, saver)
    assert not made
    assert same(state, load(file, ENGINE)[1])
    with h5py.File(file) as content:
        assert content["lr"][()] == 0.2


def test_a_discarded_checkpoint_serves_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path)
    saver = Saver(store, Alone(), ENGINE)
    first = save(store, {"w": torch.zeros(200_000)}, 1, saver)
    inode = first.stat().st_ino
    store.discard(store.committed()[0])
    second = save(store, {"w": torch.ones(100_000)}, 2, saver)
    assert second.stat().st_ino == inode
    assert same({"w": torch.ones(100_000)}, load(second, ENGINE)[1])
    assert [c.step for c in store.committed()] == [2]


def test_what_was_left_unfinished_is_not_written_over(tmp_path: Path) -> None:
    store = Store(tmp_path)
    saver = Saver(store, Alone(), ENGINE)
    state = {"w": torch.arange(100_000)}
    saving = saver.begin(1, state)
    [aside] = tmp_path.iterdir()
    # As a process has it open that hangs, or that a node runs which was cut off.
    late = os.open(aside / "state.h5", os.O_RDWR)
    saving.drop()
    good = save(store, state, 2, saver)
    os.pwrite(late, b"too late" * 100_000, 0)
    os.close(late)
    assert same(state, load(good, ENGINE)[1])
    with pytest.raises(FileNotFoundError):
        store.commit(aside, 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-000000000002"]


def test_the_same_step_again_is_another_edition(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for value in range(3):
        save(store, {"v": value}, 5)
    newest = store.committed()[-1]
    assert (newest.step, newest.edition) == (5, 3)
    assert load(newest.state, ENGINE)[1] == {"v": 2}


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    class Thing:
        pass

    cases: list[tuple[Any, str]] = [
        ({"a": {"b": [Thing()]}}, "/a/b/0 is a .*Thing"),
        ({"a": {1: 1, "b": 2}}, "the keys of /a are neither"),
        ({"a": torch.eye(3).to_sparse()}, "/a is a sparse"),
        ({"a": np.array(["x"])}, "/a is an array of <U1"),
        ({"hpcft": 1}, "cannot have a part called 'hpcft'"),
    ]
    for state, message in cases:
        with pytest.raises(HpcftError, match=message):
            save(Store(tmp_path), state)
    deep: Any = 1
    for _ in range(100):
        deep = [deep, "x"]
    with pytest.raises(Unstorable, match="deeper than"):
        save(Store(tmp_path), {"deep": deep})
    assert Store(tmp_path).committed() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if os.geteuid():
        pytest.skip("mounting a file system needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    yield disk
    # Lazily: what a failed test still holds open must not keep it.
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_said_and_leaves_what_was_committed(small_disk: Path) -> None:
    store = Store(small_disk / "checkpoints").create()
    saver = Saver(store, Alone(), ENGINE)
    state = {"w": torch.arange(400_000)}
    good = save(store, state, 1, saver)
    for step in (2, 3):
        with pytest.raises(SaveFailed, match=f"no checkpoint of step {step}: .*No space left"):
            complete(saver.begin(step, {"w": torch.zeros(2_000_000)}))
        assert [c.step for c in store.committed()] == [1]
        assert same(state, load(good, ENGINE)[1])
    store.sweep()
    assert [entry.name for entry in store.path.iterdir()] == ["step-000000000001"]
    # There is room again.
    assert same(state, load(save(store, state, 4, saver), ENGINE)[1])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    state = {"w": torch.arange(20_000), "v": {"text": "abc", "n": [1, 2, "x"]}}
    return save(Store(tmp_path_factory.mktemp("small")), state).read_bytes()


@given(data=st.data())
@settings(max_examples=300)
def test_a_damaged_file_is_refused_or_harmless(
    small: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(small)
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path = tmp_path_factory.getbasetemp() / "damaged.h5"
    path.write_bytes(raw)
    expected = {"w": torch.arange(20_000), "v": {"text": "abc", "n": [1, 2, "x"]}}
    try:
        _, state = load(path, ENGINE)
    except Damaged:
        return
    # What was hit is HDF5's own, which a restore does not need.
    assert same(expected, state)


sizes = st.lists(st.integers(0, 400_000), min_size=1, max_size=20)


@given(sizes, st.integers(1, 9))
def test_ranks_share_every_byte_once_and_no_page(lengths: list[int], ranks: int) -> None:
    specs = [Spec(f"/{i}", "tensor", "uint8", (n,)) for i, n in enumerate(lengths)]
    made = layout.make(specs)
    parts = [plan.share(specs, rank, ranks) for rank in range(ranks)]
    covered: list[list[tuple[int, int]]] = [[] for _ in specs]
    for part in sorted((p for own in parts for p in own), key=lambda p: (p.leaf, p.begin)):
        covered[part.leaf].append((part.begin, part.end))
        if part.begin:
            assert part.begin % layout.PAGE == 0
    for spec, stretches in zip(specs, covered, strict=True):
        joined = [0]
        for begin, end in stretches:
            assert begin == joined[-1]
            joined.append(end)
        assert joined[-1] == spec.nbytes
    large = [s.nbytes for s in specs if s.nbytes >= plan.LARGE]
    for rank, own in enumerate(parts):
        mine = sum(p.end - p.begin for p in own if specs[p.leaf].nbytes >= plan.LARGE)
        # Rank 0 has what is left behind the last page of each.
        assert mine <= sum(large) / ranks + layout.PAGE * (1 + (rank == 0) * len(large))
    # Rank 0 writes the metadata.
    writer = {page: 0 for at, content in made.metadata for page in pages(at, len(content))}
    for rank, own in enumerate(parts):
        written = [(made.places[p.leaf] + p.begin, p.end - p.begin) for p in own]
        for at, length in written + plan.fillers(made, own):
            assert {writer.setdefault(page, rank) for page in pages(at, length)} == {rank}


def test_no_page_of_the_file_is_two_ranks(tmp_path: Path) -> None:
    kinds = [(301, 64), (301,), (300, 100), (7,), (5, 4000)]
    specs = [
        Spec(f"/m/{i}/{n}", "tensor", "float32", (*shape[:-1], shape[-1] + i))
        for i in range(20)
        for n, shape in enumerate(kinds)
    ]
    made = layout.make(specs)
    writers: dict[int, set[int]] = {}
    for offset, content in made.metadata:
        for page in range(offset // layout.PAGE, -(-(offset + len(content)) // layout.PAGE)):
            writers.setdefault(page, set()).add(0)
    for rank in range(4):
        for part in plan.share(specs, rank, 4):
            begin, end = (made.places[part.leaf] + limit for limit in (part.begin, part.end))
            for page in range(begin // layout.PAGE, -(-end // layout.PAGE)):
                writers.setdefault(page, set()).add(rank)
    assert {len(ranks) for ranks in writers.values()} == {1}
    assert len(set.union(*writers.values())) == 4


def pages(at: int, length: int) -> range:
    """The pages of the file in which so many bytes lie."""
    return range(at // layout.PAGE, -(-(at + length) // layout.PAGE))


def test_leaves_of_ten_thousand_tensors_do_not_meet(tmp_path: Path) -> None:
    specs = [Spec(f"/m/{i}", "tensor", "float32", (i % 700,)) for i in range(3000)]
    made = layout.make(specs)
    taken = [(p, p + s.nbytes) for p, s in zip(made.places, specs, strict=True) if s.nbytes]
    taken += [(offset, offset + len(content)) for offset, content in made.metadata]
    end = layout.PAGE
    for begin, after in sorted(taken):
        assert begin >= end
        end = after
    assert end <= made.size


def test_flat_memory_is_that_of_the_tensor() -> None:
    tensor = torch.zeros(10)
    _, [leaf] = tree.flatten({"t": tensor})
    tensor += 1
    assert leaf.memory.tobytes() == torch.ones(10).numpy().tobytes()
