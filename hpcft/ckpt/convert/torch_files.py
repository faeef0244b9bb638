"""What ``torch.save`` has written, read without running code."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hpcft.ckpt.spec import DEEPEST
from hpcft.errors import HpcftError

#: So many things more than the file has bytes may be in it, where what it holds once is in several
#: places; in what is meant well each has a byte of its own at least.
_SHARED = 1 << 20
_SIGNS = (b"PK\x03\x04", b"\x80\x02")


def is_file(path: Path) -> bool:
    """Whether a file may be torch.save's: a zip archive or, of long ago, a pickle."""
    with path.open("rb") as file:
        return file.read(4).startswith(_SIGNS)


def read(source: Path) -> Any:
    """What a file holds, its tensors mapped from the disk.

    Files in the format of before torch 1.6 cannot be mapped, and are read into memory.

    Raises
    ------
    HpcftError: it is damaged, or holds what only unpickling code could bring back.
    OSError: it cannot be read.
    """
    with source.open("rb") as file:
        archive = file.read(2) == b"PK"
    found = load_data(source, str(source), mapped=archive)
    see_end(found, source.stat().st_size, str(source))
    return found


def see_end(found: Any, size: int, name: str) -> None:
    """See that what has been read can come from its file, and be gone through.

    In a pickle a list may stand in several places: a few bytes are enough for lists in lists that
    nobody could ever go through. And a view of few bytes can be a tensor of any size.

    Parameters
    ----------
    size: bytes of the file.
    name: what to call it in errors.

    Raises
    ------
    HpcftError: it is more than there can be.
    """
    _count(found, size, name, {}, 0)


def _count(value: Any, size: int, name: str, known: dict[int, int], depth: int) -> int:
    """How many things are in a value; each container is gone through once, for all its places."""
    if isinstance(value, torch.Tensor):
        if math.prod(value.shape) * value.element_size() > size:
            raise HpcftError(f"{name} holds a tensor larger than the file itself")
        return 1
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if (seen := known.get(id(value))) is not None:
        return seen
    if depth > DEEPEST:
        raise HpcftError(f"{name} holds something that lies in itself, or too deep")
    items = value.values() if isinstance(value, dict) else value
    total = 1 + sum(_count(item, size, name, known, depth + 1) for item in items)
    if total > size + _SHARED:
        raise HpcftError(f"{name} holds the same lists in lists so often that there is no end")
    known[id(value)] = total
    return total


def load_data(source: Path | BinaryIO, name: str, mapped: bool = False) -> Any:
    """``torch.load`` of tensors, arrays and plain values, and nothing else.

    Parameters
    ----------
    name: what to call the source in errors.
    mapped: map the tensors rather than read them.

    Raises
    ------
    HpcftError: it cannot be read, is damaged, or holds something else.
    """
    try:
        # The empty bytes are pickled as a call of their type.
        allowed = torch.serialization.safe_globals([bytes, *_array_globals()])
        with warnings.catch_warnings(), allowed:
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a damaged file may lead to
        why = reason(error)
        if kind := re.search(r"GLOBAL ([\w.]+)", why):
            raise HpcftError(
                f"{name} holds a {kind[1]}, which only code in it could bring back; nothing is run",
                "save tensors, numbers, texts, and dicts and lists of these: state_dict()",
            ) from error
        raise HpcftError(f"{name} is damaged, or not of torch.save: {why}") from error


def reason(error: Exception) -> str:
    """What a library says is wrong, in one line and without torch's advice."""
    said = re.search(r"(?:WeightsUnpickler error:\s*|(?=Trying to load))(.+)", str(error))
    return said[1] if said else (str(error).splitlines() or [repr(error)])[0]


def _array_globals() -> list[Any]:
    """What numpy's arrays and numbers are pickled as; numpy 1 called the module otherwise."""
    functions: list[Any] = []
    for example in (np.zeros(1), np.float64(1)):
        function: Any = example.__reduce__()[0]
        name = function.__name__
        functions += [(function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")]
    kinds = {type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdFD"}
    return [*functions, np.ndarray, np.dtype, *kinds]
