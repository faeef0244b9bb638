"""Virtual datasets over the files of several ranks, read by h5py and HDF5's own tools."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from math import prod
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5f, h5p
from hypothesis import given
from hypothesis import strategies as st

from hpcft.ckpt import virtual
from hpcft.ckpt.spec import Spec
from hpcft.ckpt.virtual import Source, boxes

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_are_the_stretch_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(begin, prod(shape)))
    numbers = np.arange(prod(shape)).reshape(shape)
    found = [
        numbers[tuple(slice(s, s + n) for s, n in zip(start, count, strict=True))].ravel()
        for start, count in boxes(shape, begin, end)
    ]
    assert len(found) <= 2 * len(shape) - 1
    assert [*np.concatenate([[], *found])] == [*range(begin, end)]


@pytest.fixture
def master(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A tensor in three files, cut in the middle of rows; and what it is."""
    spec = Spec("/model/w", "tensor", "float32", (7, 5, 11))
    content = np.arange(prod(spec.shape), dtype="f4").reshape(spec.shape)
    cuts = [0, 93, 201, content.size]
    sources = []
    for rank, (begin, end) in enumerate(itertools.pairwise(cuts)):
        name = f"shard-{rank:05d}.h5"
        with h5py.File(tmp_path / name, "w") as shard:
            shard["model/w"] = content.ravel()[begin:end]
        sources.append(Source(begin, end, name, "/model/w"))
    # As checkpoints are made: object headers without checksums, of which the attribute is part.
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, h5f.LIBVER_V110)
    path = tmp_path / "state.h5"
    file = h5f.create(bytes(path), h5f.ACC_TRUNC, fapl=access)
    with h5py.File(file) as opened:
        group = opened.create_group("model")
        made = virtual.create(group.id, "w", spec, sources, h5p.create(h5p.DATASET_CREATE))
        h5py.Dataset(made).attrs.create("crc32c", 0x12345678, dtype="<u4")
    return path, content


def test_h5py_shows_the_whole_tensor(master: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    path, content = master
    # The folder may be moved, as a commit does, and read from anywhere.
    moved = path.parent.rename(tmp_path.with_name("moved")) / path.name
    with h5py.File(moved) as file:
        dataset = file["model/w"]
        assert dataset.is_virtual
        assert {source.file_name for source in dataset.virtual_sources()} == {
            f"shard-{rank:05d}.h5" for rank in range(3)
        }
        assert np.array_equal(dataset[...], content)
        assert np.array_equal(dataset[2:5, 1, ::3], content[2:5, 1, ::3])


@pytest.mark.skipif(not shutil.which("h5dump"), reason="needs hdf5-tools")
def test_the_hdf5_tools_show_it(master: tuple[Path, np.ndarray]) -> None:
    path, content = master
    command = ["h5dump", "-d", "/model/w", "-y", "-w", "0", path]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "VIRTUAL" in shown or "DATASET" in shown
    data = shown.partition("DATA {")[2].partition("}")[0]
    assert [float(word) for word in data.replace(",", " ").split()] == [*content.ravel()]
    listed = subprocess.run(["h5ls", "-r", path], check=True, capture_output=True, text=True)
    assert "/model/w                 Dataset {7, 5, 11}" in listed.stdout


def test_its_checksum_can_be_filled_in_without_the_library(
    master: tuple[Path, np.ndarray],
) -> None:
    path, content = master
    raw = path.read_bytes()
    assert raw.count(bytes.fromhex("78563412")) == 1
    path.write_bytes(raw.replace(bytes.fromhex("78563412"), bytes.fromhex("efbeadde")))
    with h5py.File(path) as file:
        assert file["model/w"].attrs["crc32c"] == 0xDEADBEEF
        assert np.array_equal(file["model/w"][...], content)
