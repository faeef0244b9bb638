"""Checkpoints written in the formats of others, and what others have written taken in."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import hpcft
from hpcft.ckpt import dtypes
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.convert import dcp as dcp_directories
from hpcft.ckpt.convert import importing
from hpcft.ckpt.convert.leaves import Leaves
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.reader import opened
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Store
from hpcft.cli.ckpt import export
from hpcft.cli.main import main
from hpcft.errors import HpcftError

ENGINE = Engine(4 << 20, chunk=1 << 20)
DTYPES = sorted([*dtypes._NUMPY, *dtypes._FLOATS, *dtypes._OPAQUE])

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def any_bits(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor of random bits, not-a-numbers and infinities of all kinds among them."""
    size = int(np.prod(shape)) * dtypes.item_size(dtype)
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (size,), dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(shape)


def example() -> dict[str, Any]:
    torch.manual_seed(5)
    model = {f"layers.{dtype}": any_bits(dtype, 3, 5) for dtype in DTYPES}
    model |= {
        "large": torch.randn(300, 400),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }
    moments = {"exp_avg": torch.randn(200, 300), "step": torch.tensor(3.0)}
    return {
        "model": model,
        "optimizer": {
            "state": {0: moments, 1: {}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1]}],
        },
        "loss": {},
        "sampler": {"rng": np.arange(5, dtype=np.uint32), "pair": (torch.ones(3), 2), "order": []},
        "values": {"best": 0.3, "note": "a/b", "none": None, "history": [1, 2], "seen": b"\0"},
    }


def save(store: Store, state: dict[str, Any], step: int = 30) -> Path:
    saving = Saver(store, Alone(), ENGINE).begin(step, state)
    while not saving.advance():
        pass
    saving.finish()
    return store.committed()[-1].path


def newest(folder: Path) -> tuple[int, dict[str, Any]]:
    return load(Store(folder).committed()[-1].state, ENGINE)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def plain(value: Any) -> Any:
    """Something that == compares: tensors and arrays as type, shape and bits."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, tuple(value.shape), bits(value)
    if isinstance(value, np.ndarray):
        return "array", value.dtype, value.shape, value.tobytes()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(tmp_path / "checkpoints").create()
    save(store, example())
    return store.path


def ckpt(*argv: object, code: int = 0) -> None:
    assert main(["ckpt", *map(str, argv)]) == code


def failing(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 1) -> str:
    """The one line of an error."""
    ckpt(*argv, code=code)
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@contextmanager
def in_memory() -> Iterator[Path]:
    """A directory in which flushing costs nothing, for many small cases."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield Path(place)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# -- safetensors -------------------------------------------------------------------------------


def test_safetensors_holds_the_model_by_its_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.safetensors"
    ckpt("export", folder, target, "--format", "safetensors", "--json")
    said = json.loads(capsys.readouterr().out)
    # Of all types one has no place there.
    assert said["left_out"] == [
        *("/model/layers.complex128", "/optimizer", "/loss", "/sampler", "/values/seen")
    ]
    expected = example()["model"]
    del expected["layers.complex128"]
    assert plain(load_file(target)) == plain(expected)
    with safe_open(target, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["hpcft.step"] == "30"
    assert json.loads(metadata["values/history"]) == [1, 2]
    assert names(tmp_path) == ["checkpoints", "model.safetensors"]


def test_tensors_in_a_file_are_aligned(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    ckpt("export", folder, target, "--format", "safetensors")
    raw = target.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    for name, about in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            size = example()["model"][name].element_size()
            assert about["data_offsets"][0] % size == 0


def test_parts_are_chosen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.safetensors"
    parts = ["--part", "optimizer", "--part", "sampler"]
    ckpt("export", folder, target, "--format", "safetensors", *parts)
    assert sorted(load_file(target)) == [
        *("optimizer.state.0.exp_avg", "optimizer.state.0.step", "sampler.pair.0", "sampler.rng")
    ]
    with safe_open(target, "pt") as file:
        assert json.loads(file.metadata()["optimizer/param_groups/0/lr"]) == 0.1
    error = failing(
        capsys, "export", folder, tmp_path / "y", "--format", "safetensors", "--part", "no", code=2
    )
    assert "there is no part no; there are model, optimizer" in error


def test_large_models_are_cut_as_hugging_face_does(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    ckpt("export", folder, target, "--format", "safetensors", "--max-shard-size", "1K")
    files = names(target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = [name for name in files if name.endswith(".safetensors")]
    assert shards == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) >= 3
    together: dict[str, torch.Tensor] = {}
    for shard in shards:
        loaded = load_file(target / shard)
        assert len(loaded) == 1 or sum(t.nbytes for t in loaded.values()) <= 1024
        assert {index["weight_map"][name] for name in loaded} == {shard}
        together |= loaded
    expected = example()["model"]
    del expected["layers.complex128"]
    assert plain(together) == plain(expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in together.values())
    # And back, from all of them.
    ckpt("import", target, tmp_path / "again")
    assert plain(newest(tmp_path / "again")) == plain((30, {"model": expected, "values": {}}))


def test_safetensors_of_others_are_taken_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {f"w.{dtype}": any_bits(dtype, 4, 3) for dtype in DTYPES if dtype != "complex128"}
    save_file(weights, tmp_path / "w.safetensors")
    ckpt("import", tmp_path / "w.safetensors", tmp_path / "to", "--part", "net", "--step", 7)
    assert "a training that tracks one cannot start from it" in capsys.readouterr().out
    assert plain(newest(tmp_path / "to")) == plain((7, {"net": weights, "values": {}}))
    ckpt("verify", tmp_path / "to")


# -- DCP ---------------------------------------------------------------------------------------


def test_dcp_loads_the_whole_state(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "dcp"
    ckpt("export", folder, target, "--format", "dcp")
    state = example()
    blank = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "optimizer": {
            "state": {0: {"exp_avg": torch.zeros(200, 300), "step": torch.tensor(0.0)}},
            "param_groups": [{"lr": 0.0, "betas": (0.0, 0.0), "params": []}],
        },
        "values": {"best": 0.0, "note": ""},
        "hpcft": {"step": 0},
    }
    dcp.load(blank, checkpoint_id=target)
    assert plain(blank["model"]) == plain(state["model"])
    assert plain(blank["optimizer"]["state"][0]) == plain(state["optimizer"]["state"][0])
    assert blank["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert blank["values"] == {"best": 0.3, "note": "a/b"}
    assert blank["hpcft"] == {"step": 30}
    dcp_to_torch_save(target, tmp_path / "state.pt")
    whole = torch.load(tmp_path / "state.pt", weights_only=False)
    assert plain(whole["model"]) == plain(state["model"])
    assert plain(whole["sampler"]) == plain(state["sampler"])


def test_dcp_and_back_is_the_same_to_the_bit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt("export", folder, tmp_path / "dcp", "--format", "dcp")
    ckpt("import", tmp_path / "dcp", tmp_path / "again")
    assert plain(newest(tmp_path / "again")) == plain((30, example()))
    ckpt("diff", folder, tmp_path / "again")
    assert "they hold the same" in capsys.readouterr().out
    assert names(tmp_path / "again") == ["step-000000000030"]


keys = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=4)
leaf = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(0, 9), max_size=3).map(torch.tensor),
    st.lists(st.integers(0, 9), max_size=3).map(np.array),
)
trees = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(st.dictionaries(keys.filter(lambda key: key != "hpcft"), trees, min_size=1, max_size=3))
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_any_state_survives_dcp(state: dict[str, Any]) -> None:
    with in_memory() as place:
        survives(place, state)


def survives(place: Path, state: dict[str, Any]) -> None:
    path = save(Store(place / "from").create(), state)
    code = main(["ckpt", "export", str(path), str(place / "dcp"), "--format", "dcp"])
    if code:
        # DCP joins keys by dots, and then cannot tell some apart.
        flat = [".".join(map(str, keys_)) for keys_, _ in _paths(state)]
        assert len(set(flat)) < len(flat) or any("." in key for key in flat)
        return
    ckpt("import", place / "dcp", place / "to")
    # A mapping without entries is the same whatever its keys were.
    assert plain(newest(place / "to")) == plain(newest(place / "from"))


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*path, key))
    else:
        yield path, value


def training() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("form", ["dcp", "torch.save"])
def test_a_training_goes_on_from_what_others_saved(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = training()
    train(model, optimizer, range(5))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    source = tmp_path / "source"
    if form == "dcp":
        dcp.save(state, checkpoint_id=source)
    else:
        torch.save(state, source)
    ckpt("import", source, tmp_path / "to", "--step", 5)
    assert "tracks just model, optimizer" in capsys.readouterr().out
    train(model, optimizer, range(5, 9))

    again, its_optimizer = training()
    restored = hpcft.State(model=again, optimizer=its_optimizer)
    restored.from_tree(*newest(tmp_path / "to"))
    assert (restored.step, restored.epoch) == (5, 2)
    train(again, its_optimizer, range(5, 9))
    assert plain(again.state_dict()) == plain(model.state_dict())


_SHARDED = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
rank, meeting, target = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = {"even": torch.arange(24.0).reshape(6, 4), "odd": torch.arange(15).reshape(5, 3)}
sharded = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in whole.items()}
dcp.save({"model": sharded, "epoch": 4}, checkpoint_id=target)
dist.barrier()
os._exit(0)  # gloo's threads can abort a process on its way out
"""


def test_what_was_sharded_is_put_together(tmp_path: Path) -> None:
    target = tmp_path / "dcp"
    ranks = [
        subprocess.Popen([sys.executable, "-c", _SHARDED, str(rank), tmp_path / "meet", target])
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    assert len(list(target.glob("*.distcp"))) == 2
    ckpt("import", target, tmp_path / "to")
    whole = {"even": torch.arange(24.0).reshape(6, 4), "odd": torch.arange(15).reshape(5, 3)}
    assert plain(newest(tmp_path / "to")) == plain((0, {"model": whole, "values": {"epoch": 4}}))
    # A lost file is a lost part.
    next(target.glob("__1_*")).unlink()
    ckpt("import", target, tmp_path / "again", code=1)
    assert not (tmp_path / "again").exists()


def test_an_optimizer_without_state_is_one_all_the_same(tmp_path: Path) -> None:
    # DCP leaves empty dicts out.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5)
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "dcp")
    ckpt("import", tmp_path / "dcp", tmp_path / "to")
    assert newest(tmp_path / "to")[1]["optimizer"] == optimizer.state_dict()


# -- torch.save --------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_torch_save(zipped: bool, tmp_path: Path) -> None:
    model, _ = training()
    state = OrderedDict(model.state_dict())
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    ckpt("import", tmp_path / "m.pt", tmp_path / "to")
    assert plain(newest(tmp_path / "to")) == plain((0, {"model": dict(state), "values": {}}))


def test_arrays_and_numbers_of_numpy_are_data(tmp_path: Path) -> None:
    state = {"sampler": {"rng": np.arange(4.0), "best": np.float32(0.5), "n": np.int64(3)}}
    torch.save(state, tmp_path / "s.pt")
    ckpt("import", tmp_path / "s.pt", tmp_path / "to")
    found = newest(tmp_path / "to")[1]["sampler"]
    assert plain(found) == plain({"rng": np.arange(4.0), "best": 0.5, "n": 3})


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_what_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sprung = tmp_path / "sprung"
    state = {"model": {"w": torch.ones(2)}, "config": Trap(sprung)}
    for zipped in (True, False):
        torch.save(state, tmp_path / "s.pt", _use_new_zipfile_serialization=zipped)
        error = failing(capsys, "import", tmp_path / "s.pt", tmp_path / "to")
        assert "which only code in it could bring back; nothing is run" in error
        assert "posix.mkdir" in error
    # In DCP's data, and in its description.
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    assert "nothing is run" in failing(capsys, "import", tmp_path / "dcp", tmp_path / "to")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Trap(sprung)))
    error = failing(capsys, "import", tmp_path / "dcp", tmp_path / "to")
    assert "posix.mkdir, which is not let through" in error
    assert not sprung.exists()
    assert not (tmp_path / "to").exists()


# -- what is damaged, or wrong -----------------------------------------------------------------


def test_files_that_end_too_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"w": torch.randn(5000), "v": torch.ones(3)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name, says in (("w.safetensors", "no whole safetensors file"), ("w.pt", "is damaged")):
        whole = (tmp_path / name).read_bytes()
        for length in (len(whole) - 1, len(whole) // 2, 9):
            (tmp_path / name).write_bytes(whole[:length])
            assert says in failing(capsys, "import", tmp_path / name, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_directories_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "dcp"
    dcp.save({"model": {"w": torch.randn(5000), "v": torch.ones(3)}}, checkpoint_id=source)
    data, metadata = source / "__0_0.distcp", source / ".metadata"
    whole, description = data.read_bytes(), metadata.read_bytes()

    data.write_bytes(whole[:-9000])
    assert "should hold 20012 bytes" in failing(capsys, "import", source, tmp_path / "to")
    data.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) // 2))
    assert f"{source} cannot be read" in failing(capsys, "import", source, tmp_path / "to")
    data.unlink()
    assert "should hold" in failing(capsys, "import", source, tmp_path / "to")
    data.write_bytes(whole)
    metadata.write_bytes(description[:-50])
    assert "cannot be taken" in failing(capsys, "import", source, tmp_path / "to")
    metadata.unlink()
    error = failing(capsys, "import", source, tmp_path / "to")
    assert "has no .metadata, so it was never completed" in error
    assert not (tmp_path / "to").exists()


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=60)
@pytest.mark.parametrize("form", ["dcp", "torch.save", "safetensors"])
def test_damage_is_an_error_and_never_worse(form: str, spots: list[tuple[int, int]]) -> None:
    with in_memory() as place:
        survive(place, form, spots)


def survive(place: Path, form: str, spots: list[tuple[int, int]]) -> None:
    state = {"w": torch.arange(40.0), "v": torch.ones(3).bfloat16()}
    source = place / "source.safetensors"
    if form == "dcp":
        dcp.save({**state, "note": [1, (2, "x")]}, checkpoint_id=source)
        file = source / (".metadata" if spots[0][0] % 2 else "__0_0.distcp")
    elif form == "torch.save":
        torch.save({**state, "rng": np.arange(3)}, file := source)
    else:
        save_file(state, file := source)
    raw = bytearray(file.read_bytes())
    for offset, value in spots:
        raw[offset % len(raw)] = value
    file.write_bytes(raw)
    code = main(["ckpt", "import", str(source), str(place / "to")])
    assert code in (0, 1, 2)
    # What is committed is whole; what is not leaves nothing.
    assert (place / "to").exists() == (code == 0)
    if code == 0:
        ckpt("verify", place / "to")


def test_a_view_of_few_bytes_does_not_fill_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 50)}, tmp_path / "w.pt")
    error = failing(capsys, "import", tmp_path / "w.pt", tmp_path / "to")
    assert "a tensor larger than the file itself" in error
    held: list[Any] = []
    held.append(held)
    torch.save({"w": held}, tmp_path / "w.pt")
    assert "lies in itself" in failing(capsys, "import", tmp_path / "w.pt", tmp_path / "to")


def test_lists_in_lists_that_have_no_end_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists: Any = [torch.zeros(1)]
    tuples: Any = (1.0,)
    for _ in range(30):
        lists, tuples = [lists] * 10, (tuples,) * 10
    torch.save({"w": lists}, tmp_path / "w.pt")
    assert "there is no end" in failing(capsys, "import", tmp_path / "w.pt", tmp_path / "to")
    dcp.save({"w": {"deep": tuples}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert "there is no end" in failing(capsys, "import", tmp_path / "dcp", tmp_path / "to")
    assert not (tmp_path / "to").exists()
    # The same list in a few places is nobody's harm.
    torch.save({"w": [[torch.zeros(1)]] * 3}, tmp_path / "few.pt")
    ckpt("import", tmp_path / "few.pt", tmp_path / "to")


def test_a_damaged_checkpoint_is_not_exported(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "step-000000000030" / "state.h5"
    raw = bytearray(file.read_bytes())
    raw[raw.index(bits(example()["model"]["large"])) + 5] ^= 1
    file.write_bytes(raw)
    for form, target in (("safetensors", "x.safetensors"), ("safetensors", "x"), ("dcp", "d")):
        error = failing(capsys, "export", folder, tmp_path / target, "--format", form)
        assert "damaged is /model/large" in error
    assert names(tmp_path) == ["checkpoints"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["export", "c", "old", "--format", "dcp"], "old exists"),
        (["export", "c", "old", "--format", "dcp", "--force"], "old holds notes.txt"),
        (["export", "c", "old/notes.txt", "--format", "dcp", "--force"], "is no directory"),
        (["export", "c", "no/x", "--format", "dcp"], "there is no directory no"),
        (["export", "c", "x", "--format", "dcp", "--step", "7"], "no checkpoint of step 7"),
        (["export", "c", "x", "--format", "dcp", "--part", "model"], "are of safetensors"),
        (["export", "c", "x", "--format", "safetensors", "--max-shard-size", "5X"], "is no size"),
        (["import", "nowhere", "to"], "there is no nowhere"),
        (["import", "old/notes.txt", "to"], "is neither safetensors"),
        (["import", "c", "to"], "needs no import"),
        (["import", "old/w.safetensors", "c", "--step", "30"], "checkpoint of step 30 in c"),
        (["import", "old/w.safetensors", "to", "--step", "-1"], "--step -1 makes no sense"),
        (["import", "old/w.safetensors", "to", "--part", "values"], "no part can be called"),
    ],
)
def test_wrong_use_touches_nothing(
    argv: list[str],
    says: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename("c")
    Path("old").mkdir()
    Path("old/notes.txt").write_text("mine")
    save_file({"w": torch.ones(2)}, "old/w.safetensors")
    assert says in failing(capsys, *argv, code=2)
    assert names(tmp_path) == ["c", "old"]
    assert names(tmp_path / "c") == ["step-000000000030"]
    assert Path("old/notes.txt").read_text() == "mine"


def test_without_the_library(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    error = failing(capsys, "import", tmp_path / "w.safetensors", tmp_path / "to")
    assert "safetensors is not installed; pip install safetensors" in error


# -- whole or absent ---------------------------------------------------------------------------


def test_force_replaces_what_an_export_has_written(folder: Path, tmp_path: Path) -> None:
    for form, target in (("safetensors", "x.safetensors"), ("safetensors", "x"), ("dcp", "d")):
        for _ in range(2):
            ckpt("export", folder, tmp_path / target, "--format", form, "--force")
    assert names(tmp_path) == ["checkpoints", "d", "x", "x.safetensors"]
    assert names(tmp_path / "x") == ["model.safetensors"]


@pytest.fixture
def sigint() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even if it was ignored when the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize(
    ("form", "target"), [("safetensors", "x.safetensors"), ("safetensors", "x"), ("dcp", "d")]
)
def test_ctrl_c_leaves_no_half_written_target(
    form: str,
    target: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @contextmanager
    def struck(*_: object) -> Iterator[Callable[[int, int], None]]:
        def advance(moved: int, total: int) -> None:
            if moved > total // 2:
                signal.raise_signal(signal.SIGINT)

        yield advance

    ckpt("export", folder, tmp_path / target, "--format", form)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    monkeypatch.setattr(export, "bar", struck)
    ckpt("export", folder, tmp_path / target, "--format", form, "--force", code=130)
    assert capsys.readouterr().err == "hpcft: interrupted\n"
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert names(tmp_path) == sorted(["checkpoints", target])


@pytest.mark.usefixtures("sigint")
def test_an_import_broken_off_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "to").create()
    save(store, {"model": {"w": torch.ones(3)}}, 1)
    slow = Engine(4 << 20, chunk=1 << 20, bandwidth=4 << 20)

    def struck(moved: int, total: int) -> None:
        assert total == 8 << 20
        signal.raise_signal(signal.SIGINT)

    found = importing.Found(None, {"model": {"w": torch.ones(2 << 20)}, "values": {}})
    with pytest.raises(KeyboardInterrupt):
        importing.commit(found, 2, store.path, slow, struck)
    assert names(store.path) == ["step-000000000001"]


_HALF_WAY = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.convert import importing
from hpcft.cli.ckpt import export
from hpcft.cli.main import main

what, command, *argv = sys.argv[1:]
rename = Path.rename

def half_way(moved, total):
    if command == "export" and moved <= total // 2:
        return
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "waits":
        print("half-way", flush=True)
        sys.stdin.read()

def renamed(self, target):
    if what == "killed in between" and self.name.startswith(".") and Path(target).name == "d":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)

@contextmanager
def bar(*_):
    yield half_way

export.bar, Path.rename = bar, renamed
if command == "export":
    sys.exit(main(["ckpt", "export", *argv]))
slow = Engine(4 << 20, chunk=1 << 20, bandwidth=4 << 20)
found = importing.Found(None, {"model": {"w": torch.ones(1 << 20)}, "values": {}})
importing.commit(found, 2, Path(argv[0]), slow, half_way)
"""


def half_way(what: str, *argv: object) -> subprocess.Popen[str]:
    """An export or import in another process that is killed there, or waits."""
    command = [sys.executable, "-c", _HALF_WAY, what, *map(str, argv)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    if what == "waits":
        assert other.stdout
        assert other.stdout.readline() == "half-way\n"
    else:
        assert other.wait() == -signal.SIGKILL
    return other


@pytest.mark.parametrize(
    ("form", "target"), [("safetensors", "x.safetensors"), ("safetensors", "x"), ("dcp", "d")]
)
def test_what_a_killed_export_has_left_is_cleared_away_by_the_next(
    form: str, target: str, folder: Path, tmp_path: Path
) -> None:
    argv = [folder, tmp_path / target, "--format", form, "--force"]
    half_way("killed", "export", *argv)
    left = set(names(tmp_path)) - {"checkpoints"}
    assert left
    other = half_way("waits", "export", *argv)
    its_own = set(names(tmp_path)) - {"checkpoints"}
    assert not its_own & left
    ckpt("export", *argv)
    assert set(names(tmp_path)) == {"checkpoints", target, *its_own}
    # What another is writing has not been touched.
    other.communicate("")
    assert other.returncode == 0
    assert names(tmp_path) == sorted(["checkpoints", target])


def test_a_kill_between_two_directories_leaves_the_one_before(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [folder, tmp_path / "d", "--format", "dcp"]
    ckpt("export", *argv)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    half_way("killed in between", "export", *argv, "--force")
    assert not (tmp_path / "d").exists()
    assert "d exists" in failing(capsys, "export", *argv, code=2)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert names(tmp_path) == ["checkpoints", "d"]


def test_what_a_killed_import_has_left_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    store = Store(tmp_path / "to").create()
    half_way("killed", "import", store.path)
    left = set(names(store.path))
    assert left
    other = half_way("waits", "import", store.path)
    torch.save({"w": torch.ones(4)}, tmp_path / "w.pt")
    ckpt("import", tmp_path / "w.pt", store.path)
    assert not left & set(names(store.path))
    other.communicate("")
    assert other.returncode == 0
    assert names(store.path) == ["step-000000000000", "step-000000000002"]
    ckpt("verify", store.path)


def test_an_import_beside_a_save_takes_nothing_of_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "to").create()
    slow = Engine(4 << 20, chunk=1 << 20, bandwidth=16 << 20)
    theirs = Saver(store, Alone(), slow).begin(5, {"model": {"w": torch.randn(2 << 20)}})
    torch.save({"w": torch.ones(4)}, tmp_path / "w.pt")
    ckpt("import", tmp_path / "w.pt", store.path, "--step", 9)
    while not theirs.advance():
        time.sleep(0.01)
    theirs.finish()
    assert names(store.path) == ["step-000000000005", "step-000000000009"]
    ckpt("verify", store.path)


def test_a_checkpoint_written_over_meanwhile_is_noticed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(folder).create()
    with opened(store.committed()[0].state) as checkpoint:
        leaves = Leaves(checkpoint, ENGINE, lambda moved, total: None)
        store.discard(store.committed()[0])
        other = example()
        other["model"]["large"] += 1
        save(store, other, 31)
        with pytest.raises(HpcftError, match="it was removed while it was read"):
            dcp_directories.write(leaves, tmp_path / "d", False)
    assert names(tmp_path) == ["checkpoints"]


# -- memory ------------------------------------------------------------------------------------

_MEASURED = """
import json, sys, threading
from hpcft.cli.main import main
from hpcft.ckpt.convert import importing
def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
before, most, over = held(), 0, threading.Event()
def watch():
    global most
    while not over.wait(0.005):
        most = max(most, held())
watcher = threading.Thread(target=watch)
watcher.start()
codes = [main(argv) for argv in json.loads(sys.argv[1])]
over.set()
watcher.join()
print(json.dumps([codes, most - before]))
"""


def test_memory_is_bounded() -> None:
    tensor, count = 4 << 20, 64
    state = {"model": {f"w{i}": torch.full((tensor // 4,), float(i)) for i in range(count)}}
    with in_memory() as place:
        save(Store(place / "from").create(), state)
        commands = [
            f"export {place}/from {place}/x.safetensors --format safetensors",
            f"export {place}/from {place}/dcp --format dcp",
            f"import {place}/dcp {place}/a",
            f"import {place}/x.safetensors {place}/b",
        ]
        argvs = json.dumps([["ckpt", *command.split()] for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, argvs], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    codes, most = json.loads(done.stdout.splitlines()[-1])
    assert codes == [0, 0, 0, 0]
    # The engine's pool, and some tensors; the state has 256 MiB.
    assert most < (64 << 20) + 16 * tensor
