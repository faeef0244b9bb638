"""Whole tensors out of the files of several ranks: virtual datasets of HDF5.

Where each rank writes a file of its own, a large leaf lies in pieces: flat stretches of it, each a
one-dimensional dataset of some file. A virtual dataset in the master file says where, so that h5py
and HDF5's tools show the tensor in its shape. HDF5 can map boxes only, so a flat stretch becomes up
to 2 n - 1 boxes of a tensor with n dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from h5py import h5d, h5g, h5p, h5s

from hpcft.ckpt import dtypes
from hpcft.ckpt.spec import Spec


@dataclass(frozen=True)
class Source:
    """A flat stretch of a leaf, and the dataset that is it.

    begin, end: elements of the leaf, in C order.
    file: name of the file, relative to the master's folder.
    path: of the one-dimensional dataset in that file, which holds nothing else.
    """

    begin: int
    end: int
    file: str
    path: str


def create(
    group: h5g.GroupID, name: str, spec: Spec, sources: Iterable[Source], how: h5p.PropDCID
) -> h5d.DatasetID:
    """Make the virtual dataset of a leaf.

    Parameters
    ----------
    group: of the master file, which has to allow the format of HDF5 1.10.
    spec: of the leaf; one dimension at least.
    sources: all of it.
    how: properties of the dataset; copied.
    """
    kind = dtypes.hdf5_type(spec.dtype)
    whole = h5s.create_simple(spec.shape)
    virtual = how.copy()
    virtual.set_layout(h5d.VIRTUAL)
    for one in sources:
        stretch = h5s.create_simple((one.end - one.begin,))
        at = 0
        for start, count in boxes(spec.shape, one.begin, one.end):
            whole.select_hyperslab(start, (1,) * len(start), block=count)
            stretch.select_hyperslab((at,), (1,), block=(prod(count),))
            virtual.set_virtual(whole, one.file.encode(), _literal(one.path), stretch)
            at += prod(count)
    whole.select_all()
    return h5d.create(group, name.encode(), kind, whole, virtual)


def _literal(path: str) -> bytes:
    """A path as a mapping takes it, in which %b would be the number of a block."""
    return path.replace("%", "%%").encode()


def boxes(
    shape: tuple[int, ...], begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes, in order, that elements ``begin`` to ``end`` of a tensor consist of.

    Yields
    ------
    (start, count): where a box begins, and its lengths, by dimension.
    """
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    row = prod(shape[1:])
    first, last = -(-begin // row), end // row
    if first > last:
        # All in one row, and not all of it.
        number = begin // row
        for start, count in boxes(shape[1:], begin - number * row, end - number * row):
            yield (number, *start), (1, *count)
        return
    for start, count in boxes(shape[1:], begin - (first - 1) * row, row):
        if begin < first * row:
            yield (first - 1, *start), (1, *count)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    for start, count in boxes(shape[1:], 0, end - last * row):
        yield (last, *start), (1, *count)
