"""A file per rank: what it is in HDF5, what becomes of it, and what is said when one is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from players import Player, together

from hpcft.ckpt import filesystem, index, layout, plan
from hpcft.ckpt._engine import Engine, crc32c
from hpcft.ckpt.filesystem import FileSystem
from hpcft.ckpt.index import Damaged, File, Piece
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.reader import opened
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import SaveFailed, Saver
from hpcft.ckpt.spec import Spec
from hpcft.ckpt.store import Store, files
from hpcft.cli.main import main

ENGINE = Engine(8 << 20, chunk=1 << 20, depth=0)


def example() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    model = {
        "w": torch.randn(300, 201, generator=generator),
        "b%b/%": torch.arange(30_000),
        "half": torch.randn(7, 100, 100, generator=generator).bfloat16(),
        "eighth": torch.randn(70_000, generator=generator).to(torch.float8_e4m3fn),
        "small": torch.ones(3),
        "few": torch.randn(2, 9000, generator=generator),
    }
    long = {"text": "häx" * 30_000, "bytes": bytes(100_000), "ints": list(range(20_000))}
    return {"model": model, "values": {**long, "lr": 0.1}}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        raw = [x.reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and bool(a == b)


def save(folder: Path, ranks: int, state: dict[str, Any], steps: int = 1) -> Path:
    """Save with so many ranks, so many times; the newest file. Others are discarded."""

    def one(player: Player) -> None:
        store = Store(folder).create()
        saver = Saver(store, player, ENGINE, layout="per-rank")
        for step in range(1, steps + 1):
            saving = saver.begin(step, state)
            saving.wait_copied()
            while not saving.advance():
                pass
            saving.finish()
            player.least(0)  # it is committed
            if player.rank == 0:
                for old in store.committed()[:-1]:
                    store.discard(old)

    assert together(ranks, one) == [None] * ranks
    return Store(folder).committed()[-1].state


def names(path: Path) -> list[str]:
    return [file.name for file in files(path.parent)]


def shards(count: int) -> list[str]:
    return [f"shard-{rank:05d}.h5" for rank in range(count)]


@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_it_comes_back_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    state = example()
    path = save(tmp_path, ranks, state)
    assert names(path) == [*shards(ranks), "state.h5"]
    assert same(state, load(path, ENGINE)[1])
    for step, found in together(3, lambda player: load(path, ENGINE, player)):
        assert step == 1
        assert same(state, found)


shapes = st.lists(st.integers(1, 90), min_size=1, max_size=4).map(tuple)


@given(
    st.lists(shapes.filter(lambda shape: prod(shape) < 300_000), min_size=1, max_size=5),
    st.lists(st.sampled_from([torch.uint8, torch.bfloat16, torch.complex128]), min_size=5),
    st.integers(1, 5),
)
@settings(max_examples=25)
def test_tensors_of_all_shapes_are_whole_in_hdf5_and_here(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    ranks: int,
) -> None:
    folder = tmp_path_factory.mktemp("shapes")
    state = {
        str(i): torch.arange(prod(shape)).to(dtype).reshape(shape)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    path = save(folder, ranks, state)
    assert same(state, load(path, ENGINE)[1])
    with h5py.File(path) as content:
        for name, tensor in state.items():
            wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            assert np.array_equal(content[name][()], wide.numpy())
    shutil.rmtree(folder)


def test_h5py_reads_whole_tensors_wherever_the_directory_is(tmp_path: Path) -> None:
    state = example()
    path = save(tmp_path / "here", 3, state)
    path = path.parent.rename(tmp_path / "moved") / path.name
    with h5py.File(path) as content:
        for name, tensor in state["model"].items():
            dataset = content["model"][name.replace("%", "%25").replace("/", "%2F")]
            assert dataset.is_virtual == (name != "small")
            raw = tensor.reshape(-1).view(torch.uint8).numpy()
            assert dataset.attrs["crc32c"] == crc32c(raw)
            if name == "eighth":
                assert dataset.attrs["dtype"] == b"float8_e4m3fn"
                assert np.array_equal(dataset[()], raw)
            else:
                wide = tensor.float() if name == "half" else tensor
                assert np.array_equal(dataset[()], wide.numpy())
        assert content["values/ints"][()].tolist() == state["values"]["ints"]
    # Each of the others is a file like any other, too.
    for name in shards(3):
        with h5py.File(path.with_name(name)) as content:
            for dataset in content["model"].values():
                assert dataset.ndim == 1
                assert dataset.id.get_offset() % layout.PAGE == 0 or dataset.nbytes < layout.LARGE


def test_the_hdf5_tools_show_it(tmp_path: Path) -> None:
    path = save(tmp_path, 3, {"model": {"w": torch.arange(40_000).reshape(8, 5000)}})
    listed = subprocess.run(["h5ls", "-r", path], check=True, capture_output=True, text=True)
    assert "/model/w                 Dataset {8, 5000}" in listed.stdout
    command = ["h5dump", "-d", "/model/w", "-y", "-w", "0", path]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    data = shown.partition("DATA {")[2].partition("}")[0]
    assert [int(word) for word in data.replace(",", " ").split()] == [*range(40_000)]


def test_each_file_has_one_writer_and_parts_are_equal() -> None:
    specs = [Spec(f"/{i}", "tensor", "float32", (70_001 + i,)) for i in range(7)]
    specs += [Spec("/small", "tensor", "float32", (5,)), Spec("/t", "str", "uint8", (90_000,))]
    total = sum(spec.nbytes for spec in specs if plan.divided(spec))
    covered: dict[int, int] = {}
    for rank in range(5):
        parts = plan.share(specs, rank, 5, apart=True)
        large = [part for part in parts if plan.divided(specs[part.leaf])]
        assert len({part.leaf for part in large}) == len(large)
        assert rank == 0 or large == parts
        assert abs(sum(part.end - part.begin for part in large) - total / 5) <= layout.PAGE
        for part in parts:
            covered[part.leaf] = covered.get(part.leaf, 0) + part.end - part.begin
    assert covered == {i: spec.nbytes for i, spec in enumerate(specs)}


def test_saving_again_needs_no_new_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    saver = Saver(store, Alone(), ENGINE, layout="per-rank")
    state = example()

    def once(step: int) -> Path:
        saving = saver.begin(step, state)
        while not saving.advance():
            pass
        saving.finish()
        return store.committed()[-1].state

    once(1)
    monkeypatch.setattr(layout, "_create", None)
    state["model"]["w"] += 1
    path = once(2)
    assert same(state, load(path, ENGINE)[1])
    with h5py.File(path) as content:
        assert np.array_equal(content["model/w"][()], state["model"]["w"].numpy())
        assert content["model/w"].attrs["crc32c"] == crc32c(state["model"]["w"].numpy())


def test_a_directory_used_again_keeps_no_file_of_ranks_that_are_gone(tmp_path: Path) -> None:
    state = example()
    store = Store(tmp_path)
    for ranks in (4, 2, 3):
        path = save(tmp_path, ranks, state, steps=2)
        assert names(path) == [*shards(ranks), "state.h5"]
        assert same(state, load(path, ENGINE)[1])
        store.discard(store.committed()[0])
    saving = Saver(store, Alone(), ENGINE).begin(9, state)
    while not saving.advance():
        pass
    saving.finish()
    path = store.committed()[-1].state
    assert names(path) == ["state.h5"]
    assert same(state, load(path, ENGINE)[1])


def test_a_shard_that_is_lost_is_named_with_its_leaves(tmp_path: Path) -> None:
    path = save(tmp_path, 3, example())
    second = path.with_name("shard-00001.h5")
    with h5py.File(second) as content:
        inside = [f"/model/{name}" for name in content["model"]]
        place = content[inside[0]].id.get_offset()
    good = second.read_bytes()

    def refused() -> str:
        errors = [
            *together(2, lambda player: load(path, ENGINE, player)),
            *together(1, lambda player: load(path, ENGINE, player)),
        ]
        assert {type(error) for error in errors} == {Damaged}
        [said] = {error.message for error in errors}
        assert said.startswith(f"{path}: ")
        return str(said)

    second.unlink()
    said = refused()
    assert "shard-00001.h5 is missing" in said
    assert all(leaf in said for leaf in inside)
    second.write_bytes(good[:-5000])
    assert f"has {len(good) - 5000} bytes and should have {len(good)}" in refused()
    bad = bytearray(good)
    bad[place + 100] ^= 1
    second.write_bytes(bad)
    said = refused()
    assert f"damaged are {inside[0]}" in said
    assert "shard-00001.h5" in said
    second.write_bytes(good)
    assert same(example(), load(path, ENGINE)[1])


def test_a_rank_that_cannot_write_its_file_fails_the_save(tmp_path: Path) -> None:
    def one(player: Player) -> None:
        store = Store(tmp_path)
        saver = Saver(store, player, ENGINE, layout="per-rank")
        begin = store.begin

        def spoilt(step: int) -> Path:
            aside = begin(step)
            (aside / "shard-00001.h5").mkdir()
            return aside

        store.begin = spoilt  # type: ignore[method-assign]
        saving = saver.begin(1, example())
        while not saving.advance():
            pass

    first, second = together(2, one)
    assert isinstance(first, SaveFailed)
    assert isinstance(second, SaveFailed)
    assert "shard-00001.h5" in first.message
    assert Store(tmp_path).committed() == []


def test_rank_0_chooses_by_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(folder: Path) -> list[Any]:
        def one(player: Player) -> Any:
            saver = Saver(Store(folder).create(), player, ENGINE, layout="auto")
            saving = saver.begin(1, example())
            while not saving.advance():
                pass
            saving.finish()
            return saver.chosen

        return together(2, one)

    told = filesystem.at(tmp_path).layout()
    assert chosen(tmp_path / "told") == [told, None]

    def untold(path: Path) -> FileSystem:
        raise OSError("no mount is listed")

    monkeypatch.setattr(filesystem, "at", untold)
    assert chosen(tmp_path / "untold")[0][0] == "shared"
    monkeypatch.setattr(filesystem, "at", lambda path: FileSystem("nfs4"))
    assert chosen(tmp_path / "nfs")[0][0] == "per-rank"
    path = Store(tmp_path / "nfs").committed()[0].state
    assert names(path) == [*shards(2), "state.h5"]


def test_more_files_than_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = example()
    path = save(tmp_path, 8, state)
    monkeypatch.setattr("hpcft.ckpt.reader._AT_ONCE", 2)
    assert same(state, load(path, ENGINE)[1])


def test_the_sub_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "c", 3, example())
    size = sum(file.stat().st_size for file in files(path.parent))

    def rows(*argv: object, code: int = 0) -> list[dict[str, Any]]:
        assert main(["ckpt", *map(str, argv), "--json"]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert [(row["bytes"], row["damage"]) for row in rows("ls", tmp_path / "c")] == [(size, None)]
    [seen] = rows("top", tmp_path / "c", "--once")
    assert [row["bytes"] for row in seen["committed"]] == [size]
    leaf = next(row for row in rows("show", path) if row["path"] == "/model/w")
    assert {piece["file"] for piece in leaf["pieces"]} <= set(shards(3))
    assert sum(piece["bytes"] for piece in leaf["pieces"]) == leaf["bytes"]
    assert main(["ckpt", "show", str(path)]) == 0
    assert "layout per-rank: 4 files" in capsys.readouterr().out
    other = Saver(Store(tmp_path / "other").create(), Alone(), ENGINE).begin(1, example())
    while not other.advance():
        pass
    other.finish()
    assert rows("diff", path, tmp_path / "other") == []
    exported = tmp_path / "w.safetensors"
    rows("export", path, exported, "--format", "safetensors", "--part", "model")
    rows("import", exported, tmp_path / "imported")
    assert rows("verify", path, tmp_path / "imported")[0]["ok"]
    assert main(["ckpt", "show", str(path.with_name("shard-00002.h5"))]) == 1
    assert "name state.h5 beside it" in capsys.readouterr().err
    path.with_name("shard-00002.h5").unlink()
    [said] = rows("verify", path, code=1)
    assert "shard-00002.h5 is missing" in said["why"]
    [listed] = rows("ls", tmp_path / "c", code=1)
    assert "shard-00002.h5 is missing" in listed["damage"]


# -- what an index may not say ---------------------------------------------------------------------

SPECS = [
    Spec("/a", "tensor", "uint8", (10,)),
    Spec("/b", "tensor", "uint8", (0,)),
    Spec("/c", "tensor", "uint8", (6,)),
]
STRUCTURE = ["dict", [["a", 0], ["b", 1], ["c", 2]]]
GOOD = [Piece(0, 0, 4, 1, 20), Piece(0, 4, 6, 2, 0), Piece(2, 0, 6, 1, 24)]


def decoded(
    pieces: list[Piece], shards: tuple[File, ...] = (File("x.h5", 30), File("y.h5", 6))
) -> index.Index:
    text = index.encode(STRUCTURE, SPECS, shards)
    # Not by encode_pieces, which puts them in order.
    table = np.array(pieces, "<u8").tobytes()
    return index.decode(text, table, bytes(4 * (3 + len(pieces))), File("state.h5", 100))


def test_pieces_are_found() -> None:
    content = decoded(GOOD)
    assert list(content.pieces(0, 2, 7)) == [Piece(0, 2, 2, 1, 22), Piece(0, 4, 3, 2, 0)]
    assert list(content.pieces(0, 4, 5)) == [Piece(0, 4, 1, 2, 0)]
    assert [*content.pieces(0), *content.pieces(1), *content.pieces(2)] == GOOD
    assert content.leaves_in(1) == ["/a", "/c"]
    assert content.size == 136


@pytest.mark.parametrize(
    "pieces",
    [
        GOOD[1:],
        GOOD[:2],
        [*GOOD[:2], GOOD[1], GOOD[2]],
        [GOOD[1], GOOD[0], GOOD[2]],
        [GOOD[2], *GOOD[:2]],
        [GOOD[0], Piece(0, 5, 5, 2, 0), GOOD[2]],
        [GOOD[0], Piece(0, 3, 7, 0, 0), GOOD[2]],
        [GOOD[0], Piece(0, 4, 7, 0, 0), GOOD[2]],
        [GOOD[0], Piece(0, 4, 6, 3, 0), GOOD[2]],
        [GOOD[0], Piece(0, 4, 6, 2, 1), GOOD[2]],
        [GOOD[0], Piece(0, 4, 6, 2, 2**64 - 6), GOOD[2]],
        [GOOD[0], GOOD[1], Piece(1, 0, 0, 1, 0), GOOD[2]],
        [GOOD[0], GOOD[1], Piece(2, 0, 6, 1, 23)],
        [*GOOD, Piece(3, 0, 1, 0, 0)],
        [],
    ],
    ids=str,
)
def test_pieces_that_do_not_make_up_the_leaves_are_refused(pieces: list[Piece]) -> None:
    with pytest.raises(Damaged):
        decoded(pieces)


@pytest.mark.parametrize(
    "shard",
    [
        *(File(name, 6) for name in ("../y.h5", "/y", "", ".", "..", "é", "a\0", "x.h5")),
        File("state.h5", 6),
        File("y" * 200, 6),
        File("y.h5", -1),
        File("y.h5", 1 << 63),
        File("y.h5", 5),
    ],
    ids=str,
)
def test_files_that_lead_elsewhere_are_refused(shard: File) -> None:
    with pytest.raises(Damaged):
        decoded(GOOD, (File("x.h5", 30), shard))


def test_files_that_are_smaller_than_the_index_says_cost_no_memory(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"w": torch.zeros(100_000)})
    shard = path.with_name("shard-00000.h5")
    shard.unlink()
    with pytest.raises(Damaged, match="is missing"), opened(path):
        pass
