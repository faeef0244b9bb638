"""Directories of torch.distributed.checkpoint (DCP).

DCP keeps plain values, and the directory's description ``.metadata``, as pickles. What is read here
is unpickled without running code: only the few classes that DCP's description consists of, and what
``torch.load(weights_only=True)`` takes, are let through.

DCP turns integer keys into text and leaves empty containers out. So the structure of the state goes
along, and is found again by an import.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils import _pytree as pytree

from hpcft.ckpt import dtypes
from hpcft.ckpt.convert.aside import aside
from hpcft.ckpt.convert.leaves import Advance, Leaves
from hpcft.ckpt.convert.torch_files import load_data, reason, see_end
from hpcft.ckpt.index import OWN
from hpcft.ckpt.spec import DEEPEST, Node
from hpcft.ckpt.tree import Unstorable, places, unflatten
from hpcft.errors import HpcftError

_METADATA = ".metadata"
_DATA = ".distcp"
#: Of tensors in the scratch file.
_ALIGNMENT = 64
#: So many items may lists have for which there is nothing; DCP leaves out what is empty.
_LONGEST = 1 << 20
_ABSENT = object()
_DESCRIPTION = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


def write(leaves: Leaves, target: Path, force: bool) -> list[Path]:
    """Write a whole state as a directory.

    What was a part is a key of the state dict; ``hpcft.step`` is the step.

    Returns
    -------
    The files.

    Raises
    ------
    UsageError: the target exists, or cannot be.
    Damaged: what is read is not as it was written.
    HpcftError: DCP cannot write it, for want of room, for example.
    """
    values: list[Any] = [None] * len(leaves.specs)
    wanted: dict[int, int] = {}
    for leaf, _ in places(leaves.structure):
        spec = leaves.specs[leaf]
        if spec.kind == "tensor":
            values[leaf] = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            wanted[id(values[leaf])] = leaf
        else:
            values[leaf] = leaves.value(leaf)
    state = unflatten(leaves.structure, values)
    state[OWN] = {"step": leaves.step, "structure": json.dumps(leaves.structure)}
    with aside(target, force, _ours) as path:
        writer = FileSystemWriter(path, per_thread_copy_ahead=0)
        with _as_raised(f"DCP cannot write {target}"):
            save(state, storage_writer=writer, planner=_Supplier(leaves, wanted), no_dist=True)
        files = sorted(entry.name for entry in path.iterdir())
    return [target / file for file in files]


def _ours(name: str) -> bool:
    return name == _METADATA or name.endswith(_DATA)


class _Supplier(DefaultSavePlanner):
    """Reads a tensor when it is to be written; until then an empty one stands for it."""

    def __init__(self, leaves: Leaves, wanted: dict[int, int]) -> None:
        super().__init__()
        self._leaves = leaves
        self._wanted = wanted
        self._before: mmap.mmap | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        return pytree.tree_map_only(torch.Tensor, self._read, super().lookup_object(index))

    def _read(self, stand_in: torch.Tensor) -> torch.Tensor:
        if self._before:
            # It has been written, but the writer holds all tensors of a file until its end.
            self._before.madvise(mmap.MADV_DONTNEED)
        tensor, self._before = self._leaves.tensor(self._wanted[id(stand_in)])
        return tensor


# -- reading -----------------------------------------------------------------------------------


def is_directory(path: Path) -> bool:
    """Whether a directory is DCP's, whole or not."""
    return (path / _METADATA).exists() or any(path.glob(f"*{_DATA}"))


@contextmanager
def read(source: Path, room: Path, advance: Advance) -> Iterator[dict[str, Any]]:
    """Read a whole directory.

    DCP fills tensors that exist already. They are mapped from a scratch file without a name, so
    that a state larger than the memory can be read; the file is as large as the state.

    Parameters
    ----------
    room: a directory with room for the scratch file.
    advance: told how many bytes have been read.

    Raises
    ------
    HpcftError: the directory is not whole, or holds what only unpickling code could bring back.
    OSError: there is no room.
    """
    metadata = _metadata(source)
    found = metadata.state_dict_metadata
    tensors = _tensors(found, source)
    total = sum(map(_nbytes, tensors.values()))
    held = sum(entry.stat().st_size for entry in source.iterdir() if entry.is_file())
    if total > held:
        raise HpcftError(
            f"{source} should hold {total} bytes of tensors and has only {held}",
            "copy it again from where it was",
        )
    with tempfile.TemporaryFile(dir=room) as scratch:
        memory = _Scratch(scratch, sum(map(_room, tensors.values())))
        flat: dict[str, Any] = {
            key: memory.take(tensors[key]) if key in tensors else None for key in found
        }
        taker = _Taker(advance, total)
        with _as_raised(f"{source} cannot be read"):
            load(flat, storage_reader=_Reader(source, metadata), planner=taker, no_dist=True)
        yield _nested({**flat, **taker.taken}, getattr(metadata, "planner_data", None), source)


class _Description(pickle.Unpickler):
    """Lets nothing through but what DCP's descriptions consist of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DESCRIPTION:
            return super().find_class(module, name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not let through")


def _metadata(source: Path) -> Metadata:
    path = source / _METADATA
    if not path.exists():
        raise HpcftError(
            f"{source} has no .metadata, so it was never completed or not copied as a whole",
            "take an earlier one",
        )
    try:
        with path.open("rb") as file:
            found = _Description(file).load()
    except Exception as error:  # whatever a damaged pickle may lead to
        raise HpcftError(f"{path} cannot be taken: {reason(error)}") from error
    if (
        not isinstance(found, Metadata)
        or not isinstance(getattr(found, "state_dict_metadata", None), dict)
        or not isinstance(getattr(found, "storage_data", None), dict)
    ):
        raise HpcftError(f"{path} does not describe a checkpoint of DCP")
    return found


def _tensors(found: dict[Any, Any], source: Path) -> dict[str, TensorStorageMetadata]:
    """What is described as tensors, all of it checked."""
    tensors = {}
    for key, about in found.items():
        if isinstance(key, str) and isinstance(about, TensorStorageMetadata):
            _check(key, about, source)
            tensors[key] = about
        elif not (isinstance(key, str) and isinstance(about, BytesStorageMetadata)):
            raise HpcftError(f"{source} is damaged: {key!r} is described as nothing known"[:200])
    return tensors


def _check(key: str, about: TensorStorageMetadata, source: Path) -> None:
    try:
        dtype = str(about.properties.dtype).removeprefix("torch.")
        dtypes.item_size(dtype)
        shapes = [about.size, *(chunk.sizes for chunk in about.chunks)]
        if not all(type(n) is int and 0 <= n < 1 << 62 for shape in shapes for n in shape):
            raise ValueError("no shape")
    except KeyError:
        raise Unstorable(f"{key} is a tensor of {dtype}, which a checkpoint cannot hold") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise HpcftError(f"{source} is damaged: {key} is no tensor: {error}") from error
    if sum(math.prod(chunk.sizes) for chunk in about.chunks) != math.prod(about.size):
        raise HpcftError(f"{source} is not whole: parts of {key} are missing", "copy it again")


def _nbytes(about: TensorStorageMetadata) -> int:
    return math.prod(about.size) * about.properties.dtype.itemsize


def _room(about: TensorStorageMetadata) -> int:
    return -(-_nbytes(about) // _ALIGNMENT) * _ALIGNMENT


class _Scratch:
    """Tensors in a file."""

    def __init__(self, file: Any, size: int) -> None:
        self._place = 0
        self._memory: Any = b""
        if size:
            # Or a full disk would be a signal that ends the process.
            os.posix_fallocate(file.fileno(), 0, size)
            self._memory = mmap.mmap(file.fileno(), size)

    def take(self, about: TensorStorageMetadata) -> torch.Tensor:
        """A tensor, uninitialized."""
        dtype, place = about.properties.dtype, self._place
        if not _nbytes(about):
            return torch.empty(about.size, dtype=dtype)
        self._place += _room(about)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=_nbytes(about), offset=place)
        return flat.view(dtype).reshape(about.size)


class _Reader(FileSystemReader):
    """Takes the description as it has been read."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._read = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._read


class _Taker(DefaultLoadPlanner):
    """Takes data, never code."""

    def __init__(self, advance: Advance, total: int) -> None:
        super().__init__(flatten_state_dict=False)
        self.taken: dict[str, Any] = {}
        self._advance = advance
        self._moved, self._total = 0, total

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        key = read_item.dest_index.fqn
        size = value.seek(0, os.SEEK_END)
        value.seek(0)
        found = self.taken[key] = load_data(value, key)
        see_end(found, size, key)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self._moved += tensor.nbytes
        self._advance(self._moved, self._total)


@contextmanager
def _as_raised(says: str) -> Iterator[None]:
    """DCP wraps what has happened, Ctrl-C included; raise that itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as wrapped:
        error = next(iter(wrapped.failures.values()))[0]
        if isinstance(error, HpcftError) or not isinstance(error, Exception):
            raise error from None
        raise HpcftError(f"{says}: {reason(error)}") from error
    except HpcftError:
        raise
    except Exception as error:  # the planner's, which is not wrapped
        raise HpcftError(f"{says}: {reason(error)}") from error


def _nested(flat: dict[str, Any], paths: Any, source: Path) -> dict[str, Any]:
    """The state dict, from its leaves and their paths, where those are known."""
    if not paths:
        return flat
    root: dict[str, Any] = {}
    empty = 0
    try:
        for key, value in flat.items():
            path = paths.get(key, (key,))
            if not 0 < len(path) <= DEEPEST or not isinstance(path[0], str):
                raise ValueError(f"no path: {path!r}"[:200])
            held: Any = root
            for step, following in zip(path, (*path[1:], None), strict=True):
                new = value if following is None else {} if isinstance(following, str) else []
                if isinstance(held, list):
                    missing = step + 1 - len(held)
                    empty += max(0, missing)
                    if step < 0 or empty > _LONGEST + len(flat):
                        raise ValueError(f"no place in a list: {step!r}")
                    held += [None] * missing
                    held[step] = new if held[step] is None else held[step]
                elif isinstance(step, str):
                    held.setdefault(step, new)
                else:
                    raise ValueError(f"no key: {step!r}")
                held = held[step]
        own = root.get(OWN)
        if isinstance(own, dict) and isinstance(own.get("structure"), str):
            return {**_as_it_was(json.loads(own["structure"]), root), OWN: own}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise HpcftError(f"{source} is damaged: no state: {error!r}") from error
    return root


def _as_it_was(node: Node, found: Any) -> Any:
    """What ``node`` describes, of what DCP has made of it."""
    # DCP keeps a tuple as it is, with all that is in it.
    if isinstance(node, int) or node[0] == "tuple":
        if found is _ABSENT:
            raise KeyError("a leaf is missing")
        return found
    kind, content = node
    if kind == "list":
        return [_as_it_was(item, _item(found, i)) for i, item in enumerate(content)]
    return {key: _as_it_was(item, _item(found, str(key))) for key, item in content}


def _item(found: Any, key: int | str) -> Any:
    """An item of a container; DCP has left out those that are empty."""
    try:
        return found[key]
    except (LookupError, TypeError):
        return _ABSENT
