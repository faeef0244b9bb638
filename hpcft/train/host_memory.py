"""Tensors as MPI can use them: contiguous, in host memory, of a type that it knows."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from hpcft.ckpt import device

#: Those that it can add up; others are bytes to it.
TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.bool: MPI.C_BOOL,
}


class HostMemory:
    """A tensor's memory as MPI can use it.

    Contiguous tensors in host memory are used as they are. Others, those on a device, and for
    reductions those of types that MPI cannot add (bfloat16, float16, float8), travel through a
    copy, reductions in float32; :meth:`settle` brings the result back.

    Parameters
    ----------
    fill: the tensor's values are to be sent.
    """

    def __init__(self, tensor: torch.Tensor, reduce: bool = False, fill: bool = True) -> None:
        self._tensor = tensor
        work = tensor.detach()
        if work.is_complex():
            work = torch.view_as_real(work)
        if reduce and work.dtype not in TYPES:
            work = work.float()
        if device.is_elsewhere(work):
            staged = device.beside(work.device, work.shape, work.dtype)
            if fill:
                # Waits for the current stream.
                staged.copy_(work)
            work = staged
        self.flat = work.contiguous().reshape(-1)
        self._direct = self.flat.data_ptr() == tensor.data_ptr()

    @property
    def buffer(self) -> tuple[Any, MPI.Datatype]:
        """What mpi4py takes."""
        return buffer(self.flat)

    def settle(self) -> None:
        """Bring the result to the tensor, if it is not there yet."""
        if not self._direct:
            put(self._tensor, self.flat)


def buffer(flat: torch.Tensor) -> tuple[Any, MPI.Datatype]:
    """What mpi4py takes for a tensor in host memory."""
    kind = TYPES.get(flat.dtype)
    if kind is None:
        return flat.view(torch.uint8).numpy(), MPI.BYTE
    return flat.numpy(), kind


def put(part: torch.Tensor, got: torch.Tensor) -> None:
    """Bring to a tensor what has come for it; on a device when its current stream comes to it."""
    target = torch.view_as_real(part) if part.is_complex() else part
    if got.dtype != target.dtype:
        # Converted there.
        got = got.to(target.device, non_blocking=True)
    target.copy_(got.view_as(target), non_blocking=True)


def room(like: torch.Tensor, ranks: int, mine: HostMemory) -> torch.Tensor:
    """Host memory for what all ranks have of a tensor."""
    return device.beside(like.device, (ranks * mine.flat.numel(),), mine.flat.dtype)


def elements(memory: HostMemory) -> int:
    data, _ = memory.buffer
    return int(data.size)
