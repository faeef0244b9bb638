"""Sharded state: shards make up their tensors, and come back on other ranks, cut in other ways."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from players import Player, together
from shardings import LEAVES, blank, cut, state
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.placement_types import _StridedShard

from hpcft.ckpt import exchange, plan, shards, tree
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.division import Division
from hpcft.ckpt.filesystem import Layout
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.layout import LARGE, PAGE
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Saver
from hpcft.ckpt.shards import Runs
from hpcft.ckpt.spec import Spec
from hpcft.ckpt.store import Store
from hpcft.ckpt.tree import Unstorable
from hpcft.errors import HpcftError
from hpcft.train.state import State

ENGINE = Engine(8 << 20, chunk=1 << 20, depth=0)


@st.composite
def cuts(draw: st.DrawFn, dims: int) -> tuple[tuple[int, ...], list[Placement]]:
    """A mesh, and how a tensor of so many dimensions lies on it."""
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    choices: list[st.SearchStrategy[Placement]] = [st.just(Replicate())]
    if dims:
        choices.append(st.integers(0, dims - 1).map(Shard))
    placements = draw(st.lists(st.one_of(choices), min_size=len(mesh), max_size=len(mesh)))
    if len(mesh) == 2 and isinstance(placements[1], Shard) and draw(st.booleans()):
        # As FSDP over a tensor-parallel weight.
        placements[0] = _StridedShard(placements[1].dim, split_factor=mesh[1])
    return mesh, placements


@st.composite
def cut_tensors(
    draw: st.DrawFn, longest: int
) -> tuple[tuple[int, ...], tuple[int, ...], list[Placement]]:
    shape = tuple(draw(st.lists(st.integers(0, longest), max_size=3)))
    return (shape, *draw(cuts(len(shape))))


def bytes_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


@given(
    cut_tensors(longest=9),
    st.sampled_from([torch.int8, torch.int16, torch.float64]),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=5),
)
@settings(max_examples=50)
def test_a_shard_has_the_bytes_that_pytorch_gives_it(
    case: Any, dtype: torch.dtype, stretches_of_it: list[tuple[float, float]]
) -> None:
    shape, mesh, placements = case
    whole = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    found = []
    for rank in range(math.prod(mesh)):
        mine = cut(whole, mesh, placements, rank)
        shard = tree.shard_of(mine, "/x")
        runs = Runs.of(shape, dtype.itemsize, shard)
        expected = bytes_of(mine.to_local())
        raw = bytes_of(whole)
        stretches = list(zip(runs.begins.tolist(), runs.ends.tolist(), strict=True))
        assert b"".join(raw[begin:end].tobytes() for begin, end in stretches) == expected.tobytes()
        # As long as they can be.
        assert all(a[1] < b[0] for a, b in itertools.pairwise(stretches)) or not stretches
        for limits in stretches_of_it:
            begin, end = sorted(int(limit * len(raw)) for limit in limits)
            low, high = runs.between(begin, end)
            inside = runs.within(begin, end)
            assert (inside.ends - inside.begins).sum() == high - low
            got = [raw[b:e] for b, e in zip(inside.begins, inside.ends, strict=True)]
            assert np.concatenate([*got, raw[:0]]).tolist() == expected[low:high].tolist()
        found.append(shard)
    kinds = shards.holdings(found)
    assert Division(shape, 1, kinds).complete
    if len(kinds) > 1:
        assert not Division(shape, 1, kinds[1:]).complete
        assert not Division(shape, 1, (*kinds, kinds[0])).complete


@given(cut_tensors(longest=70), st.integers(0, 2))
@settings(max_examples=50)
def test_every_byte_is_in_one_part_and_no_page_in_two(case: Any, extra: int) -> None:
    shape, mesh, placements = case
    size = math.prod(mesh) + extra
    spec = Spec("/x", "tensor", "float64", shape)
    whole = torch.empty(shape, dtype=torch.float64, device="meta")
    mine = [
        tree.shard_of(cut(whole, mesh, placements, rank), "/x") for rank in range(math.prod(mesh))
    ]
    held = plan.held([spec], [{0: shard} for shard in mine] + [{}] * extra)
    parts = [plan.share([spec], rank, size, held) for rank in range(size)]
    end = 0
    for part in sorted((p for own in parts for p in own), key=lambda p: p.begin):
        assert part.begin == end
        assert part.begin % PAGE == 0
        end = part.end
    assert end == spec.nbytes
    if spec.nbytes >= LARGE:
        # Nobody writes much more than is his if what is held by several is divided.
        most = max(Runs.of(shape, 8, shard).before[-1] for shard in mine)
        assert max(sum(p.end - p.begin for p in own) for own in parts) <= most + 2 * PAGE


def test_leaves_of_one_kind_are_divided_once_and_as_each_by_itself() -> None:
    ranks, kinds = 64, [((512, 300), "float32"), ((512, 300), "float64"), ((70, 9), "float32")]
    specs = [Spec(f"/{i}", "tensor", dtype, shape) for i in range(5) for shape, dtype in kinds]

    def shards_of(rank: int) -> dict[int, shards.Shard]:
        split = (shards.Split(0),)
        found = {
            i: shards.Shard.of(spec.shape, (ranks,), (rank,), split) for i, spec in enumerate(specs)
        }
        # As it comes from another process.
        again: dict[int, shards.Shard] = pickle.loads(pickle.dumps(found))
        return again

    everybodys = [shards_of(rank) for rank in range(ranks)]
    held = plan.held(specs, everybodys)
    assert len(set(held.values())) == len(kinds)
    for rank in (0, 17, ranks - 1):
        alone = []
        for i, spec in enumerate(specs):
            only = plan.held([spec], [{0: theirs[i]} for theirs in everybodys])
            parts = plan.share([spec], rank, ranks, only)
            alone += [replace(part, leaf=i) for part in parts]
        assert plan.share(specs, rank, ranks, held) == alone


@given(cut_tensors(longest=40), st.sampled_from([torch.int8, torch.float32]))
@settings(max_examples=40)
def test_what_is_collected_is_the_tensor_and_what_is_distributed_the_shards(
    case: Any, dtype: torch.dtype
) -> None:
    shape, mesh, placements = case
    size = math.prod(mesh)
    whole = torch.randn(shape).mul(100).to(dtype)
    raw = bytes_of(whole)
    spec = Spec("/x", "tensor", str(dtype).removeprefix("torch."), shape)
    leaves = [cut(whole, mesh, placements, rank) for rank in range(size)]
    held = plan.held([spec], [{0: tree.shard_of(leaf, "/x")} for leaf in leaves])

    def there_and_back(ranks: Player) -> int:
        shard = bytes_of(leaves[ranks.rank].to_local())
        parts = plan.share([spec], ranks.rank, size, held)
        common = plan.overlaps([spec], ranks.rank, held)
        own = exchange.sections(ranks.rank, parts, common, {0: shard})
        exchange.collect(ranks, common, own, {0: shard})
        written = 0
        for section in own.values():
            for part, memory in section.pieces:
                assert (memory == raw[part.begin : part.end]).all()
                written += memory.size
        before = shard.copy()
        blank = np.zeros_like(shard)
        own = exchange.sections(ranks.rank, parts, common, {0: blank})
        for section in own.values():
            for part, memory in section.pieces:
                memory[:] = raw[part.begin : part.end]
        exchange.distribute(ranks, common, own, {0: blank})
        assert (blank == before).all()
        return written

    assert sum(together(size, there_and_back)) == raw.size


# -- whole checkpoints ---------------------------------------------------------------------------

CUTS: list[tuple[tuple[int, ...], list[Placement] | None]] = [
    ((1,), None),
    ((1,), [Shard(0)]),
    ((3,), [Shard(0)]),
    ((8,), [Shard(0)]),
    ((3,), [Shard(1)]),
    ((2, 2), [Replicate(), Shard(0)]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    ((2, 3), [Shard(1), Shard(1)]),
]
#: What each of them is restored to.
RESTORED: list[tuple[tuple[int, ...], list[Placement] | None]] = [
    ((3,), None),
    ((3,), [Shard(0)]),
    ((2, 2), [_StridedShard(0, split_factor=2), Shard(1)]),
]


def save(
    folder: Path,
    mesh: tuple[int, ...],
    placements: Sequence[Placement] | None,
    layout: Layout = "shared",
) -> Path:
    def one(ranks: Player) -> None:
        saver = Saver(Store(folder).create(), ranks, ENGINE, layout=layout)
        saving = saver.begin(3, state(mesh, placements, ranks.rank))
        saving.wait_copied()
        while not saving.advance():
            pass
        saving.finish()

    assert together(math.prod(mesh), one) == [None] * math.prod(mesh)
    return Store(folder).committed()[-1].state


def restore(path: Path, mesh: tuple[int, ...], placements: Sequence[Placement] | None) -> list[Any]:
    def one(ranks: Player) -> Any:
        live = state(mesh, placements, ranks.rank)
        return load(path, ENGINE, ranks, blank(live))

    return together(math.prod(mesh), one)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, DTensor):
        return isinstance(b, DTensor) and torch.equal(a.to_local(), b.to_local())
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


@pytest.mark.parametrize("layout", ["shared", "per-rank"])
@pytest.mark.parametrize("saved", CUTS, ids=str)
def test_what_some_ranks_save_others_restore(
    tmp_path: Path, saved: tuple[tuple[int, ...], list[Placement]], layout: Layout
) -> None:
    path = save(tmp_path, *saved, layout)
    files = 1 if layout == "shared" else 1 + math.prod(saved[0])
    assert len(list(path.parent.glob("*.h5"))) == files
    expected = state((1,), None, 0)
    with h5py.File(path) as content:
        for name in LEAVES:
            assert (content[f"model/{name}"][()] == expected["model"][name].numpy()).all()
    assert same(load(path, ENGINE)[1], expected)
    for mesh, placements in RESTORED:
        found = restore(path, mesh, placements)
        for rank, (step, content) in enumerate(found):
            assert step == 3
            assert same(state(mesh, placements, rank), content)


@pytest.mark.parametrize("layout", ["shared", "per-rank"])
def test_from_8_to_3_ranks_every_byte_is_read_once(tmp_path: Path, layout: Layout) -> None:
    path = save(tmp_path, (8,), [Shard(0)], layout)

    def read() -> int:
        # Of this process by system calls; the engine is one without io_uring.
        return int(Path("/proc/self/io").read_text().split()[1])

    needed = sum(
        leaf.numel() * leaf.element_size() for leaf in state((1,), None, 0)["model"].values()
    )
    for placements in ([Shard(0)], [Shard(1)]):
        before = read()
        found = restore(path, (3,), placements)
        assert all(step == 3 for step, _ in found)
        # With the index, which every rank reads, and the pages of small leaves.
        assert read() - before <= 1.05 * needed + 3 * 20_000


def test_damage_in_one_ranks_part_is_told_by_all(tmp_path: Path) -> None:
    path = save(tmp_path, (3,), [Shard(0)])
    with h5py.File(path) as content:
        place = content["model/uneven"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(place + 100_000)
        file.write(b"damage")
    for placements in ([Shard(0)], [Shard(1)]):
        for error in restore(path, (3,), placements):
            assert isinstance(error, Damaged)
            assert "damaged are /model/uneven" in error.message
            assert str(path) in error.message


def test_a_file_that_one_rank_cannot_read_is_told_by_all(tmp_path: Path) -> None:
    path = save(tmp_path / "good", (3,), [Shard(0)])

    def one(ranks: Player) -> Any:
        place = path if ranks.rank != 1 else tmp_path / "missing"
        return load(place, ENGINE, ranks, blank(state((3,), [Shard(0)], ranks.rank)))

    first, second, third = together(3, one)
    assert isinstance(second, FileNotFoundError)
    for error in (first, third):
        assert isinstance(error, Damaged)
        assert "No such file" in error.message


def test_shards_that_leave_a_hole_are_refused(tmp_path: Path) -> None:
    whole = torch.zeros(90, 4)

    def one(ranks: Player) -> None:
        # Each has the second shard.
        Saver(Store(tmp_path), ranks, ENGINE).begin(1, {"w": cut(whole, (2,), [Shard(0)], 1)})

    for error in together(2, one):
        assert isinstance(error, HpcftError)
        assert "the ranks' shards of /w do not make up the tensor" in error.message
    path = save(tmp_path, (3,), [Shard(0)])
    live = state((3,), [Shard(0)], 1)
    with pytest.raises(HpcftError, match="shards of /model/even do not make up the tensor"):
        load(path, ENGINE, target=blank(live))


def test_what_is_not_yet_reduced_is_refused(tmp_path: Path) -> None:
    partial = cut(torch.zeros(4), (2,), [Replicate()], 0)
    spec = DTensorSpec(partial.device_mesh, (Partial(),), partial._spec.tensor_meta)
    with pytest.raises(Unstorable, match=r"/w is P.*of which no rank has the value"):
        tree.flatten({"w": DTensor(torch.zeros(4), spec, requires_grad=False)})


def test_a_shard_whose_memory_has_gaps_is_filled_all_the_same(tmp_path: Path) -> None:
    path = save(tmp_path, (3,), [Shard(0)])

    def one(ranks: Player) -> Any:
        live = state((3,), [Shard(1)], ranks.rank)
        wide = live["model"]["wide"]
        apart = torch.zeros(200, 64).t()
        assert not apart.is_contiguous()
        live["model"]["wide"] = DTensor(apart, wide._spec, requires_grad=False)
        _, content = load(path, ENGINE, ranks, blank(live))
        assert content["model"]["wide"].to_local().data_ptr() == apart.data_ptr()
        return same(content, state((3,), [Shard(1)], ranks.rank))

    assert together(3, one) == [True] * 3


def moments_apart(ranks: int, rank: int, seed: int) -> State:
    """Replicated parameters, of which each rank keeps its shard of Adam's moments (ZeRO-1)."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(300, 100)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
        moments = {
            name: cut(torch.randn(parameter.shape, generator=generator), (ranks,), [Shard(0)], rank)
            for name in ("exp_avg", "exp_avg_sq")
        }
        optimizer.state[parameter] = {"step": torch.tensor(float(seed)), **moments}
    return State(model=model, optimizer=optimizer)


def test_shards_that_only_the_optimizer_has_come_back_as_shards(tmp_path: Path) -> None:
    def one(ranks: Player) -> None:
        content = moments_apart(3, ranks.rank, seed=1).to_tree(frozen=False)
        saving = Saver(Store(tmp_path), ranks, ENGINE).begin(5, content)
        while not saving.advance():
            pass
        saving.finish()

    assert together(3, one) == [None] * 3
    path = Store(tmp_path).committed()[-1].state

    def other(ranks: Player) -> bool:
        live, wanted = (moments_apart(2, ranks.rank, seed) for seed in (2, 1))
        assert live.sharded()
        live.from_tree(*load(path, ENGINE, ranks, live.targets()))
        kept = live.optimizer.state_dict()["state"]
        assert all(isinstance(kept[i]["exp_avg"], DTensor) for i in (0, 1))
        return same(live.to_tree(frozen=False), wanted.to_tree(frozen=False))

    assert together(2, other) == [True] * 2


def test_saving_shards_again_asks_nobody(tmp_path: Path) -> None:
    def one(ranks: Player) -> Any:
        saver = Saver(Store(tmp_path), ranks, ENGINE)
        gathered = []
        usual = ranks.gather

        def gather(value: Any) -> list[Any]:
            gathered.append(value)
            return usual(value)

        ranks.gather = gather  # type: ignore[method-assign]
        counts = []
        for step in (1, 2):
            saving = saver.begin(step, state((2,), [Shard(0)], ranks.rank))
            while not saving.advance():
                pass
            saving.finish()
            counts.append(len(gathered))
        return counts

    # The shards and the checksums; then the checksums.
    assert together(2, one) == [[2, 3]] * 2
    assert same(load(Store(tmp_path).committed()[-1].state, ENGINE)[1], state((1,), None, 0))
