"""A training state as a tree of plain data and tensors, and the tree as leaves that are bytes.

What can be kept: dicts (keys of str or int), lists, tuples; torch tensors and numpy arrays; None,
bool, int, float, str, bytes. Nothing is pickled: what comes back from a file is data, never code.
Of a DTensor this rank's shard is kept.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcft.ckpt import device, dtypes
from hpcft.ckpt.device import Bytes
from hpcft.ckpt.layout import LARGE
from hpcft.ckpt.shards import Shard, Split
from hpcft.ckpt.spec import DEEPEST, Node, Spec
from hpcft.errors import HpcftError

#: By the bytes of an element: as what numpy takes tensors of types it does not have.
_BITS = {1: torch.uint8, 2: torch.int16}


@dataclass(frozen=True)
class Leaf:
    """A leaf and its bytes.

    spec: of the whole leaf.
    memory: a flat array, or for what is on a device a flat tensor, of uint8.
    shard: what of the leaf is in memory, if it is a shard.
    """

    spec: Spec
    memory: Bytes
    shard: Shard | None = None


class Unstorable(HpcftError):
    """The state holds something that cannot go into a checkpoint."""


def flatten(tree: Any) -> tuple[Node, list[Leaf]]:
    """Take a tree apart; the leaves of contiguous tensors are views of them.

    Raises
    ------
    Unstorable: there is something in it that cannot be kept; the message says where.
    """
    leaves: list[Leaf] = []
    return _node(tree, "", leaves, 0), leaves


def _name(key: str) -> str:
    """A key as a name in HDF5, where "/" separates and "." is the group itself."""
    name = key.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return {"": "%", ".": "%2E"}.get(name, name)


def _node(value: Any, path: str, leaves: list[Leaf], depth: int) -> Node:
    if depth > DEEPEST:
        raise Unstorable(f"{path} lies deeper than {DEEPEST} levels", "store something flatter")
    if isinstance(value, dict):
        whole_numbers = bool(value) and all(type(key) is int for key in value)
        if not whole_numbers and not all(isinstance(key, str) for key in value):
            raise Unstorable(
                f"the keys of {path or '/'} are neither all str nor all int", "use one of them"
            )
        items = [
            [key, _node(item, f"{path}/{_name(str(key))}", leaves, depth + 1)]
            for key, item in value.items()
        ]
        return ["intdict" if whole_numbers else "dict", items]
    if type(value) in (list, tuple) and not _uniform(value):
        nodes = [_node(item, f"{path}/{i}", leaves, depth + 1) for i, item in enumerate(value)]
        return [type(value).__name__, nodes]
    leaves.append(_leaf(value, path or "/value"))
    return len(leaves) - 1


def _uniform(value: list[Any] | tuple[Any, ...]) -> bool:
    """Whether it is numbers of one kind, which fit into one dataset."""
    kinds = {type(item) for item in value}
    return kinds == {float} or (kinds == {int} and all(map(_fits, value)))


def _fits(number: int) -> bool:
    return -(1 << 63) <= number < 1 << 63


def _leaf(value: Any, path: str) -> Leaf:
    if isinstance(value, torch.Tensor):
        return _tensor(value, path)
    if isinstance(value, np.ndarray):
        return _array(value, path)
    if value is None:
        return _plain(path, "none", "uint8", np.zeros(1, np.uint8), ())
    kind = type(value)
    if kind is bool or kind is np.bool_:
        return _plain(path, "bool", "bool", np.array(value, "?"), ())
    if (kind is int and _fits(value)) or isinstance(value, np.signedinteger):
        return _plain(path, "int", "int64", np.array(value, "<i8"), ())
    if kind is int:
        # Rare, and too large for any type of HDF5: its hexadecimal digits.
        return _text(path, "bigint", hex(value).encode())
    if isinstance(value, (float, np.floating)):
        return _plain(path, "float", "float64", np.array(value, "<f8"), ())
    if isinstance(value, str):
        return _text(path, "str", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _text(path, "bytes", value)
    if kind in (list, tuple):
        number = type(value[0]).__name__
        array = np.array(value, "<i8" if number == "int" else "<f8")
        dtype = "int64" if number == "int" else "float64"
        return _plain(path, f"{number}{kind.__name__}", dtype, array, array.shape)
    raise Unstorable(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold",
        "keep tensors, numbers, texts, and dicts and lists of these in the state",
    )


def _plain(path: str, kind: str, dtype: str, array: Any, shape: tuple[int, ...]) -> Leaf:
    return Leaf(Spec(path, kind, dtype, shape), array.reshape(-1).view(np.uint8))


def _text(path: str, kind: str, text: bytes) -> Leaf:
    return Leaf(Spec(path, kind, "uint8", (len(text),)), np.frombuffer(text, np.uint8))


def _array(array: np.ndarray[Any, Any], path: str) -> Leaf:
    try:
        dtype = dtypes.numpy_name(array.dtype)
    except KeyError:
        raise Unstorable(
            f"{path} is an array of {array.dtype}, which a checkpoint cannot hold",
            "use numbers of at most 8 bytes, or complex ones of them",
        ) from None
    array = np.ascontiguousarray(array, dtypes.numpy_type(dtype))
    return _plain(path, "ndarray", dtype, array, array.shape)


def _tensor(tensor: torch.Tensor, path: str) -> Leaf:
    dtype = str(tensor.dtype).removeprefix("torch.")
    try:
        dtypes.item_size(dtype)
    except KeyError:
        raise Unstorable(f"{path} is a tensor of {dtype}, which a checkpoint cannot hold") from None
    shard, work = None, tensor
    if is_sharded(tensor):
        shard = shard_of(tensor, path)
        work = local(tensor)
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Unstorable(f"{path} is a sparse or quantized tensor", "store its parts")
    spec = Spec(path, "tensor", dtype, tuple(tensor.shape))
    return Leaf(spec, _memory(work, dtype), shard)


def _memory(tensor: torch.Tensor, dtype: str) -> Bytes:
    """A tensor's bytes, flat: its own memory, if that is contiguous."""
    return device.flat(tensor) if device.can_be_lent(tensor) else _bytes(tensor, dtype)


def _bytes(tensor: torch.Tensor, dtype: str) -> np.ndarray[Any, Any]:
    """A tensor's bytes in host memory, flat."""
    if not dtypes.in_numpy(dtype):
        tensor = tensor.detach().view(_BITS[dtypes.item_size(dtype)])
    flat: np.ndarray[Any, Any] = tensor.numpy(force=True).reshape(-1).view(np.uint8)
    return flat


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor; does not import what has not been imported."""
    return isinstance(value, torch.Tensor) and hasattr(value, "device_mesh")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's memory of a DTensor."""
    mine: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return mine


def staging(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous memory for this rank's bytes of a tensor: its own, if that is such."""
    mine = _mine(tensor)
    return mine if mine.is_contiguous() else torch.empty(mine.shape, dtype=mine.dtype)


def unstage(tensor: torch.Tensor, staged: torch.Tensor) -> None:
    """Bring to a tensor what its :func:`staging` has come to hold."""
    mine = _mine(tensor)
    if (mine.device, mine.data_ptr()) != (staged.device, staged.data_ptr()):
        mine.copy_(staged)


def _mine(tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor) if is_sharded(tensor) else tensor.detach()


def shard_of(tensor: Any, path: str) -> Shard:
    """What of a DTensor this rank has.

    Raises
    ------
    Unstorable: its placements are not understood; names ``path``.
    """
    mesh = tensor.device_mesh
    place = mesh.get_coordinate()
    shape = tuple(tensor.shape)
    if place is None:
        raise Unstorable(f"{path} is on a mesh of other ranks", "track only what all ranks have")
    splits = tuple(_split(placement, path) for placement in tensor.placements)
    shard = Shard.of(shape, tuple(mesh.shape), tuple(place), splits)
    if shard.shape != tuple(local(tensor).shape):
        raise Unstorable(
            f"{path} is cut in a way that is not understood: {tensor.placements}",
            "make its sizes multiples of the numbers of ranks it is cut over",
        )
    return shard


def _split(placement: Any, path: str) -> Split | None:
    if placement.is_replicate():
        return None
    # A strided shard, which says of itself that it is no shard, has both as well.
    if hasattr(placement, "dim"):
        return Split(placement.dim, getattr(placement, "split_factor", 1))
    raise Unstorable(f"{path} is {placement}, of which no rank has the value", "reduce it first")


def blank(spec: Spec) -> tuple[Any, np.ndarray[Any, Any]]:
    """Memory for a leaf to be read into, and what ``value`` makes the leaf of.

    Returns
    -------
    (store, memory): a tensor for kind ``tensor``, else an array; and its bytes, flat and writable.
    """
    if spec.kind == "tensor":
        dtype = getattr(torch, spec.dtype)
        if spec.nbytes < LARGE:
            tensor = torch.empty(spec.shape, dtype=dtype)
        else:
            # At a page, as the leaf is in the file, so that it is read in place; in huge pages,
            # for to find and clear small ones takes about as long as to read them.
            pages = mmap.mmap(-1, spec.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without
                pages.madvise(mmap.MADV_HUGEPAGE)
            tensor = torch.frombuffer(pages, dtype=dtype).reshape(spec.shape)
        return tensor, _bytes(tensor, spec.dtype)
    array: np.ndarray[Any, Any] = np.empty(spec.shape, dtypes.numpy_type(spec.dtype))
    return array, array.reshape(-1).view(np.uint8)


def value(spec: Spec, store: Any) -> Any:
    """What a leaf was, from the memory it was read into."""
    if spec.kind in ("tensor", "ndarray"):
        return store
    if spec.kind == "none":
        return None
    if spec.kind in ("bool", "int", "float"):
        return store.item()
    if spec.kind == "str":
        return store.tobytes().decode("utf-8", "surrogatepass")
    if spec.kind == "bigint":
        return int(store.tobytes(), 16)
    if spec.kind == "bytes":
        return store.tobytes()
    items = store.tolist()
    return tuple(items) if spec.kind.endswith("tuple") else items


def places(
    node: Node, keys: tuple[str | int, ...] = ()
) -> Iterator[tuple[int, tuple[str | int, ...]]]:
    """The leaves, as (number, the keys that lead there)."""
    if isinstance(node, int):
        yield node, keys
        return
    kind, content = node
    named = content if kind in ("dict", "intdict") else enumerate(content)
    for key, item in named:
        yield from places(item, (*keys, key))


def unflatten(node: Node, values: list[Any]) -> Any:
    """The tree again, from its structure and the values of its leaves."""
    if isinstance(node, int):
        return values[node]
    kind, content = node
    if kind in ("dict", "intdict"):
        return {key: unflatten(item, values) for key, item in content}
    items = [unflatten(item, values) for item in content]
    return tuple(items) if kind == "tuple" else items
