"""The leaves of a checkpoint, read one at a time."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from itertools import dropwhile
from typing import Any

import torch

from hpcft.ckpt import tree
from hpcft.ckpt._engine import Engine, Transfer
from hpcft.ckpt.index import OWN, Damaged
from hpcft.ckpt.layout import LARGE
from hpcft.ckpt.plan import Part, combine
from hpcft.ckpt.reader import Opened, leaves, read_parts
from hpcft.ckpt.spec import Node, Spec

#: Told how far something is: bytes moved, and bytes in all.
Advance = Callable[[int, int], None]


class Leaves:
    """Reads leaves when they are wanted, and checks each before it is given away.

    A whole state need not fit into memory, nor be read twice; and should the checkpoint be removed
    and its blocks be written over meanwhile, the checksums tell.

    Parameters
    ----------
    checkpoint: open until the last leaf is read.
    engine: reads.
    advance: told how many bytes have been read.

    Attributes
    ----------
    structure: how the user's leaves make up the state: a ``dict`` of its parts.
    specs: all leaves, the format's own among them.
    step: steps completed.
    """

    def __init__(self, checkpoint: Opened, engine: Engine, advance: Advance) -> None:
        self.specs: tuple[Spec, ...] = checkpoint.index.specs
        self.step = checkpoint.step
        self._checkpoint = checkpoint
        self._engine = engine
        self._advance = advance
        self._moved = 0
        structure = checkpoint.index.structure
        if isinstance(structure, int) or structure[0] != "dict":
            raise Damaged("the index is damaged: no state")
        self.structure: list[Any] = ["dict", [part for part in structure[1] if part[0] != OWN]]
        self.total = sum(self.specs[i].nbytes for i in leaves(checkpoint.index))

    def expect(self, total: int) -> None:
        """Only so many bytes will be read."""
        self.total = total

    def tensor(self, leaf: int) -> tuple[torch.Tensor, mmap.mmap | None]:
        """A leaf as a tensor.

        Returns
        -------
        (tensor, memory): of a large one also its memory, for whoever has to give that back while
        others still hold the tensor.

        Raises
        ------
        Damaged: it is not as it was written.
        OSError: it cannot be read.
        """
        spec = self.specs[leaf]
        memory = None
        if spec.nbytes >= LARGE:
            memory = mmap.mmap(-1, spec.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            flat = torch.frombuffer(memory, dtype=torch.uint8)
        else:
            flat = torch.empty(spec.nbytes, dtype=torch.uint8)
        self._read(leaf, flat.numpy())
        return flat.view(getattr(torch, spec.dtype)).reshape(spec.shape), memory

    def value(self, leaf: int) -> Any:
        """What a leaf was.

        Raises
        ------
        Damaged: it is not as it was written.
        OSError: it cannot be read.
        """
        spec = self.specs[leaf]
        store, memory = tree.blank(spec)
        self._read(leaf, memory)
        try:
            return tree.value(spec, store)
        except ValueError as error:
            raise Damaged(f"{spec.path} is damaged: {error}") from error

    def raw(self, leaf: int) -> Any:
        """A leaf's bytes, flat.

        Raises
        ------
        Damaged: they are not as they were written.
        OSError: they cannot be read.
        """
        memory = torch.empty(self.specs[leaf].nbytes, dtype=torch.uint8).numpy()
        self._read(leaf, memory)
        return memory

    def _read(self, leaf: int, memory: Any) -> None:
        spec, index = self.specs[leaf], self._checkpoint.index
        if not spec.nbytes:
            return
        whole = [(Part(leaf, 0, spec.nbytes), memory)]
        try:
            summed = read_parts(self._checkpoint, self._engine, whole, _patiently)
            if combine(self.specs, summed)[leaf] != index.checksums[leaf]:
                raise Damaged(f"damaged is {spec.path}", "take another checkpoint")
        except (Damaged, FileNotFoundError) as error:
            if self._checkpoint.file.path.exists():
                raise
            raise Damaged("it was removed while it was read", "take a newer checkpoint") from error
        self._moved += spec.nbytes
        self._advance(self._moved, self.total)


def _patiently(transfer: Transfer) -> None:
    # In slices, so that Ctrl-C is heard.
    while not transfer.wait(0.1):
        pass


def named(node: Node, name: str = "") -> Iterator[tuple[str, int]]:
    """The leaves below a node, each with its keys joined by dots, behind ``name``."""
    for leaf, keys in tree.places(node):
        # What is empty at the beginning is left out, and no dot put behind it.
        parts = dropwhile(lambda part: part == "", (name, *map(str, keys)))
        yield ".".join(parts), leaf
