"""A training state as a tree of plain data and tensors, and the tree as leaves that are bytes.

What can be kept: dicts (keys of str or int), lists, tuples; torch tensors and numpy arrays; None,
bool, int, float, str, bytes. Nothing is pickled: what comes back from a file is data, never code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcft.ckpt import dtypes
from hpcft.ckpt.spec import DEEPEST, Node, Spec
from hpcft.errors import HpcftError


@dataclass(frozen=True)
class Leaf:
    """A leaf and its bytes, ``memory`` being a flat array of uint8."""

    spec: Spec
    memory: np.ndarray[Any, Any]


class Unstorable(HpcftError):
    """The state holds something that cannot go into a checkpoint."""


def flatten(tree: Any) -> tuple[Node, list[Leaf]]:
    """Take a tree apart; the leaves of contiguous tensors in host memory are views of them.

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
    if hasattr(tensor, "device_mesh"):
        raise Unstorable(f"{path} is sharded (DTensor), which is not supported yet")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise Unstorable(f"{path} is a sparse or quantized tensor", "store its parts")
    work = tensor.detach()
    if work.is_conj() or work.is_neg():
        work = work.resolve_conj().resolve_neg()
    flat = work.cpu().contiguous().reshape(-1)
    return Leaf(Spec(path, "tensor", dtype, tuple(tensor.shape)), flat.view(torch.uint8).numpy())


def blank(spec: Spec) -> tuple[Any, np.ndarray[Any, Any]]:
    """Memory for a leaf to be read into, and what ``value`` makes the leaf of.

    Returns
    -------
    (store, memory): a tensor for kind ``tensor``, else an array; and its bytes, flat and writable.
    """
    if spec.kind == "tensor":
        tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
        return tensor, tensor.reshape(-1).view(torch.uint8).numpy()
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


def unflatten(node: Node, values: list[Any]) -> Any:
    """The tree again, from its structure and the values of its leaves."""
    if isinstance(node, int):
        return values[node]
    kind, content = node
    if kind in ("dict", "intdict"):
        return {key: unflatten(item, values) for key, item in content}
    items = [unflatten(item, values) for item in content]
    return tuple(items) if kind == "tuple" else items
