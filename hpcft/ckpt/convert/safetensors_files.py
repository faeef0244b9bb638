"""safetensors files: https://huggingface.co/docs/safetensors, "Format".

Eight bytes say how long the header is; the header is JSON and tells of every tensor its type, shape
and place behind the header. They are written here, tensor by tensor, for the library wants all
tensors in memory; they are read by the library, which maps them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpcft.ckpt import dtypes
from hpcft.ckpt.convert.aside import aside
from hpcft.ckpt.convert.leaves import Leaves, named
from hpcft.ckpt.convert.torch_files import reason
from hpcft.ckpt.index import OWN
from hpcft.ckpt.spec import Node, Spec
from hpcft.errors import HpcftError, UsageError

SUFFIX = ".safetensors"
_INDEX = f"model{SUFFIX}.index.json"
_STEP = f"{OWN}.step"
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "float32": "F32", "float64": "F64", "bfloat16": "BF16", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """What of a checkpoint goes into safetensors.

    tensors: leaf by its name there.
    metadata: what is plain, as text.
    left_out: paths of leaves, or of whole parts.
    """

    tensors: dict[str, int]
    metadata: dict[str, str]
    left_out: list[str]


def choose(leaves: Leaves, wanted: Sequence[str]) -> Chosen:
    """Choose the tensors of some parts.

    Of one part a tensor is called as in its state dict; of several, with the part before it. Plain
    values of these parts and of ``values`` go into the metadata, as JSON.

    Parameters
    ----------
    wanted: names of parts; none for all that look like modules: nothing but tensors, by name.

    Raises
    ------
    UsageError: there is no such part, or nothing to write.
    """
    parts: dict[str, Node] = dict(leaves.structure[1])
    for name in wanted:
        if name not in parts:
            raise UsageError(f"there is no part {name}", f"there are {', '.join(parts)}")
    modules = [name for name, node in parts.items() if _is_module(name, node, leaves.specs)]
    taken = list(dict.fromkeys(wanted)) or modules
    if not taken:
        raise UsageError(
            "no part looks like a module's", f"choose with --part; there are {', '.join(parts)}"
        )
    tensors: dict[str, int] = {}
    metadata = {"format": "pt", _STEP: str(leaves.step)}
    left_out = []
    for part, node in parts.items():
        if part not in taken and part != "values":
            left_out.append(f"/{part}")
            continue
        for name, leaf in named(node, part if len(taken) > 1 else ""):
            spec = leaves.specs[leaf]
            if spec.kind not in ("tensor", "ndarray", "bytes"):
                metadata[spec.path.removeprefix("/")] = json.dumps(leaves.value(leaf))
            elif part not in taken or spec.kind == "bytes" or spec.dtype not in _DTYPES:
                left_out.append(spec.path)
            elif (called := name or part) in tensors or called == "__metadata__":
                raise HpcftError(f"two tensors would be called {called}", "export part by part")
            else:
                tensors[called] = leaf
    if not tensors:
        raise UsageError(f"there is no tensor in {', '.join(taken)}", "choose with --part")
    return Chosen(tensors, metadata, left_out)


def _is_module(name: str, node: Node, specs: Sequence[Spec]) -> bool:
    if name == "values" or isinstance(node, int) or node[0] != "dict" or not node[1]:
        return False
    items = [item for item in node[1] if not item[0].endswith("_extra_state")]
    return bool(items) and all(
        isinstance(item, int) and specs[item].kind == "tensor" for _, item in items
    )


def write(leaves: Leaves, chosen: Chosen, target: Path, force: bool, largest: int) -> list[Path]:
    """Write a file, or a directory of files.

    Parameters
    ----------
    target: a file if it ends in ``.safetensors``; else a directory, as Hugging Face's libraries
        read it: ``model.safetensors``, or several and an index.
    largest: bytes of tensors in a file of a directory, at most, but for a tensor larger than that.

    Returns
    -------
    The files.

    Raises
    ------
    UsageError: the target exists, or cannot be.
    Damaged: what is read is not as it was written.
    OSError: it cannot be read or written.
    """
    names = _by_alignment(chosen.tensors, leaves.specs)
    leaves.expect(sum(leaves.specs[chosen.tensors[name]].nbytes for name in names))
    if target.suffix == SUFFIX:
        with aside(target, force) as path:
            _write_file(leaves, chosen, names, path)
        return [target]
    with aside(target, force, _ours) as path:
        path.mkdir()
        sizes = {name: leaves.specs[chosen.tensors[name]].nbytes for name in names}
        shards = _shards(sizes, largest)
        files = (
            [f"model-{i:05d}-of-{len(shards):05d}{SUFFIX}" for i in range(1, len(shards) + 1)]
            if len(shards) > 1
            else [f"model{SUFFIX}"]
        )
        for file, shard in zip(files, shards, strict=True):
            _write_file(leaves, chosen, shard, path / file)
        if len(shards) > 1:
            where = {n: f for f, shard in zip(files, shards, strict=True) for n in shard}
            content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            with (path / _INDEX).open("w") as index:
                json.dump(content, index, indent=2)
                index.flush()
                os.fsync(index.fileno())
            files.append(_INDEX)
    return [target / file for file in files]


def _ours(name: str) -> bool:
    return name == _INDEX or re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", name) is not None


def _by_alignment(tensors: dict[str, int], specs: Sequence[Spec]) -> list[str]:
    """Names, those of large elements first, so that every tensor is aligned to its elements."""
    return sorted(tensors, key=lambda name: -dtypes.item_size(specs[tensors[name]].dtype))


def _shards(sizes: dict[str, int], largest: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, nbytes in sizes.items():
        if shards[-1] and held + nbytes > largest:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += nbytes
    return shards


def _write_file(leaves: Leaves, chosen: Chosen, names: Iterable[str], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": chosen.metadata}
    place = 0
    for name in names:
        spec = leaves.specs[chosen.tensors[name]]
        span = [place, place := place + spec.nbytes]
        header[name] = {
            "dtype": _DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": span,
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(leaves.raw(chosen.tensors[name]))
        file.flush()
        os.fsync(file.fileno())


# -- reading -----------------------------------------------------------------------------------


def is_directory(path: Path) -> bool:
    """Whether a directory holds safetensors files."""
    return any(path.glob(f"*{SUFFIX}"))


def read(source: Path) -> tuple[dict[str, torch.Tensor], int | None]:
    """The tensors of a file or directory by name, mapped from the disk; the step, if it is told.

    Raises
    ------
    HpcftError: the library is not there, or the source is no such file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise HpcftError(
            "the library safetensors is not installed", "pip install safetensors"
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    step = None
    for path in _files(source):
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get(_STEP, "")
                step = int(said) if said.isdecimal() and len(said) < 19 else step
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    if name in tensors:
                        raise HpcftError(f"{source} holds {name} twice")
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise HpcftError(
                f"{path} is no whole safetensors file: {reason(error)}",
                "copy it again from where it was",
            ) from error
    return tensors, step


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    index = source / _INDEX
    if not index.exists():
        return sorted(source.glob(f"*{SUFFIX}"))
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if not all(isinstance(file, str) and Path(file).name == file for file in files):
            raise ValueError("names of files are expected")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise HpcftError(f"{index} is damaged: {error!r}") from error
    missing = [file for file in files if not (source / file).is_file()]
    if missing:
        raise HpcftError(f"{source} lacks {missing[0]}, which its index names")
    return [source / file for file in files]
