"""What a checkpoint consists of, described: its leaves and how they make up the state."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from hpcft.ckpt import dtypes

#: How the structure is described: a leaf by its number, or a container.
#: ["dict" | "intdict", [[key, node], ...]] | ["list" | "tuple", [node, ...]] | number
Node = int | list[Any]

#: So deep may containers lie in each other.
DEEPEST = 64


@dataclass(frozen=True)
class Spec:
    """What a leaf is.

    path: where it is in the file, such as ``/model/layers.0.weight``.
    kind: ``tensor``, ``ndarray``, ``none``, ``bool``, ``int``, ``float``, ``str``, ``bytes``; with
        ``list`` or ``tuple`` after ``int`` or ``float`` for a list of these.
    dtype: its torch name.
    shape: of the whole tensor.
    """

    path: str
    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtypes.item_size(self.dtype)
