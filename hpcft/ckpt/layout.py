"""Where everything lies in a checkpoint's files, which are ordinary HDF5 files.

libhdf5 (by h5py) makes a file once, sparse and without data: datasets are contiguous and have
their place from the start, large ones at a multiple of the page size. What it has written is kept;
the data goes straight to the places. Saving the same shapes again needs no libhdf5 at all: only
the bytes change, and the checksums, whose places are known as well.

The first page of a file is HDF5's user block, which HDF5 leaves alone; :mod:`hpcft.ckpt.index`
puts there what makes a restore independent of libhdf5.

Where each rank writes a file of its own, that has the rank's parts of large leaves, and never
changes but for their bytes. In the file that is written last such a leaf is a virtual dataset.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5p, h5s, h5t

from hpcft.ckpt import dtypes, virtual
from hpcft.ckpt.spec import Spec
from hpcft.errors import HpcftError

PAGE = 4096
#: Datasets from this size on begin at a page.
LARGE = 65536
#: Metadata comes in blocks, so that it is not strewn over the file.
_METADATA_BLOCK = 1 << 20
_CHECKSUM = b"crc32c"
#: From the attribute's name to its value in an object header (HDF5 file format, version 1 of the
#: attribute message): the name, padded to 8 bytes, a datatype (16) and a dataspace (8).
_VALUE_AFTER = 32


class LayoutError(HpcftError):
    """The HDF5 library lays files out in a way that is not understood."""


@dataclass(frozen=True)
class Layout:
    """A file's plan.

    specs: its leaves.
    places: offset of each leaf's bytes; 0 for a leaf that has none in this file.
    checksum_places: offset of each leaf's attribute ``crc32c``, four bytes, little-endian; none in
        the file of one rank.
    metadata: stretches of what libhdf5 has written, as (offset, bytes), in order.
    size: of the file, in bytes.
    """

    specs: tuple[Spec, ...]
    places: tuple[int, ...]
    checksum_places: tuple[int, ...]
    metadata: tuple[tuple[int, bytes], ...]
    size: int


def make(
    specs: Sequence[Spec], elsewhere: Mapping[int, Sequence[virtual.Source]] | None = None
) -> Layout:
    """Plan a file for leaves of these kinds and shapes.

    Parameters
    ----------
    elsewhere: the leaves, by number, that are to be virtual datasets, and what they consist of.

    Raises
    ------
    LayoutError: libhdf5 does not do as expected.
    """
    places, metadata, size = _plan(specs, elsewhere or {}, summed=True)
    return Layout(tuple(specs), places, _checksum_places(metadata, len(specs)), metadata, size)


def make_shard(specs: Sequence[Spec]) -> Layout:
    """Plan a file for parts of leaves, each one-dimensional, without attributes."""
    places, metadata, size = _plan(specs, {}, summed=False)
    return Layout(tuple(specs), places, (), metadata, size)


def _plan(
    specs: Sequence[Spec], elsewhere: Mapping[int, Sequence[virtual.Source]], summed: bool
) -> tuple[tuple[int, ...], tuple[tuple[int, bytes], ...], int]:
    """Places, metadata and size of a :class:`Layout`."""
    with _scratch_folder() as folder:
        path = Path(folder) / "layout.h5"
        places = _create(path, specs, elsewhere, summed)
        with path.open("rb") as file:
            fd = file.fileno()
            size = os.fstat(fd).st_size
            data = sorted(
                (place, place + spec.nbytes)
                for place, spec in zip(places, specs, strict=True)
                if place
            )
            metadata = tuple(
                (begin, os.pread(fd, end - begin, begin))
                for begin, end in _without(_written(fd, size), data)
            )
    return places, metadata, size


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    # The file is sparse, which not every file system can.
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="hpcft-layout-", dir=memory if os.access(memory, os.W_OK) else None
    )


def _create(
    path: Path,
    specs: Sequence[Spec],
    elsewhere: Mapping[int, Sequence[virtual.Source]],
    summed: bool,
) -> tuple[int, ...]:
    creation = h5p.create(h5p.FILE_CREATE)
    creation.set_userblock(PAGE)
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_alignment(LARGE, PAGE)
    access.set_meta_block_size(_METADATA_BLOCK)
    # Object headers of the later format have checksums of their own, which ours would spoil.
    # Virtual datasets came with 1.10.
    newest = h5f.LIBVER_V110 if elsewhere else h5f.LIBVER_V18
    access.set_libver_bounds(h5f.LIBVER_EARLIEST, newest)
    # Written and closed when we say so, whatever Python still holds.
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    file = h5f.create(os.fsencode(path), h5f.ACC_TRUNC, creation, access)
    try:
        return _fill(file, specs, elsewhere, summed)
    finally:
        file.close()


def _fill(
    file: h5f.FileID,
    specs: Sequence[Spec],
    elsewhere: Mapping[int, Sequence[virtual.Source]],
    summed: bool,
) -> tuple[int, ...]:
    plain = h5p.create(h5p.DATASET_CREATE)
    plain.set_obj_track_times(False)
    how = plain.copy()
    how.set_layout(h5d.CONTIGUOUS)
    how.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    how.set_fill_time(h5d.FILL_TIME_NEVER)
    scalar = h5s.create(h5s.SCALAR)
    groups: dict[str, h5g.GroupID] = {"": h5g.open(file, b"/")}
    # To make objects of h5py takes as long as what libhdf5 does with them.
    spaces: dict[tuple[int, ...], h5s.SpaceID] = {(): scalar}
    kinds: dict[str, h5t.TypeID] = {}
    stamp = np.zeros((), "<u4")

    def group(path: str) -> h5g.GroupID:
        if path not in groups:
            parent, _, name = path.rpartition("/")
            groups[path] = h5g.create(group(parent), name.encode())
        return groups[path]

    places = []
    for number, spec in enumerate(specs):
        parent, _, name = spec.path.rpartition("/")
        if number in elsewhere:
            sources = elsewhere[number]
            dataset = virtual.create(group(parent), name, spec, sources, plain)
            places.append(0)
        else:
            if spec.kind == "str" and spec.nbytes:
                kind, space = _text_type(spec.nbytes), scalar
            else:
                if spec.dtype not in kinds:
                    kinds[spec.dtype] = dtypes.hdf5_type(spec.dtype)
                if spec.shape not in spaces:
                    spaces[spec.shape] = h5s.create_simple(spec.shape)
                kind, space = kinds[spec.dtype], spaces[spec.shape]
            dataset = h5d.create(group(parent), name.encode(), kind, space, how)
            places.append(dataset.get_offset() or 0)
        if not summed:
            continue
        if spec.kind != "tensor":
            _note(dataset, "kind", spec.kind)
        if dtypes.opaque(spec.dtype):
            _note(dataset, "dtype", spec.dtype)
        # The last, for others would move it and leave a copy behind. For now it is the leaf's
        # number, by which its place is found again.
        attribute = h5a.create(dataset, _CHECKSUM, h5t.STD_U32LE, scalar)
        stamp[()] = number
        attribute.write(stamp, h5t.STD_U32LE)
    return tuple(places)


def _text_type(length: int) -> h5t.TypeID:
    kind = h5t.C_S1.copy()
    kind.set_size(length)
    kind.set_strpad(h5t.STR_NULLPAD)
    kind.set_cset(h5t.CSET_UTF8)
    return kind


def _note(dataset: h5d.DatasetID, name: str, text: str) -> None:
    kind = _text_type(len(text))
    attribute = h5a.create(dataset, name.encode(), kind, h5s.create(h5s.SCALAR))
    attribute.write(np.array(text.encode(), f"S{len(text)}"), kind)


def _written(fd: int, size: int) -> list[tuple[int, int]]:
    """The stretches of a sparse file that are not holes, as (begin, end)."""
    stretches = []
    end = 0
    while end < size:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            break
        end = min(size, os.lseek(fd, begin, os.SEEK_HOLE))
        stretches.append((begin, end))
    return stretches


def _without(
    stretches: list[tuple[int, int]], data: list[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """What of ``stretches`` is in none of ``data``; all are (begin, end), in order."""
    number = 0
    for begin, end in stretches:
        while number < len(data) and data[number][1] <= begin:
            number += 1
        place = number
        while begin < end:
            if place == len(data) or data[place][0] >= end:
                yield begin, end
                break
            if data[place][0] > begin:
                yield begin, data[place][0]
            begin = data[place][1]
            place += 1


def _checksum_places(metadata: Sequence[tuple[int, bytes]], count: int) -> tuple[int, ...]:
    """Where the value of every leaf's attribute is."""
    places = [-1] * count
    found = 0
    for offset, content in metadata:
        for match in re.finditer(re.escape(_CHECKSUM) + rb"\0\0", content):
            place = match.start() + _VALUE_AFTER
            number = int.from_bytes(content[place : place + 4], "little")
            found += 1
            if number < count:
                places[number] = offset + place
    if found != count or -1 in places:
        # A libhdf5 that writes attributes in another way; or a name that is made to deceive.
        raise LayoutError(
            "the checksums' places in the HDF5 file cannot be told",
            f"HDF5 is {h5py.version.hdf5_version}",
        )
    return tuple(places)
