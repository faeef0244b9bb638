"""Many tensors as one vector."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch


class Flat:
    """The values of some tensors, one after the other, as a vector in host memory.

    Of float32, or of float64 if a tensor is; so that small changes add up whatever the tensors are.

    Parameters
    ----------
    tensors: may be on devices; integers among them are left out, for they cannot be averaged.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        # Without the graph of autograd, which is not to notice what is done here between steps.
        self._tensors = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
        kinds = (tensor.dtype for tensor in self._tensors)
        self.dtype = functools.reduce(torch.promote_types, kinds, torch.float32)
        self._sizes = [tensor.numel() for tensor in self._tensors]
        #: Whether values may be rounded when they are written.
        self.lossy = any(tensor.dtype != self.dtype for tensor in self._tensors)
        #: Number of values.
        self.size = sum(self._sizes)

    def empty(self) -> torch.Tensor:
        """A vector to read into."""
        return torch.empty(self.size, dtype=self.dtype)

    @torch.no_grad()
    def read(self, vector: torch.Tensor) -> torch.Tensor:
        """Copy the tensors' values to ``vector``, and return that."""
        if self._tensors:
            torch._foreach_copy_(self._parts(vector), self._tensors)
        return vector

    @torch.no_grad()
    def write(self, vector: torch.Tensor) -> None:
        """Give the tensors the values in ``vector``."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._parts(vector))

    def add(self, vector: torch.Tensor) -> None:
        """Add ``vector`` to the tensors."""
        own = self.read(self.empty())
        self.write(own.add_(vector))

    def _parts(self, vector: torch.Tensor) -> list[torch.Tensor]:
        parts = torch.split(vector, self._sizes)
        return [part.view(like.shape) for part, like in zip(parts, self._tensors, strict=True)]
