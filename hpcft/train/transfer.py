"""Moving a training state from one rank to others, memory to memory."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from hpcft.train.state import Contents, Slot, State, dump, load
from hpcft.world.recovery import Transfer

#: MPI counts are ints in Open MPI 5.
_CHUNK = 1 << 30


class Arrival:
    """A state on its way in; :meth:`install` makes it this rank's own.

    Parameters
    ----------
    in_place: receive straight into the live tensors where type and shape match. Fast, but the old
        state is gone at once: only for a rank whose state is worthless, such as a spare.
    """

    def __init__(self, state: State, in_place: bool) -> None:
        self._state = state
        self._in_place = in_place
        self._skeleton: Any = None
        self._tensors: list[torch.Tensor] = []

    def receive(self, comm: MPI.Intracomm, source: int) -> None:
        """Take part in the movement as a receiver."""
        self._skeleton, slots = load(comm.bcast(None, source))
        live = self._state.take_apart().tensors if self._in_place else []
        fits = [Slot.of(tensor) for tensor in live] == slots
        self._tensors = (
            live if fits else [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in slots]
        )
        _broadcast(comm, self._tensors, source)

    def install(self) -> None:
        """Put what has arrived in the place of what this rank had."""
        if self._skeleton is not None:
            self._state.install(self._skeleton, self._tensors)
            self._skeleton, self._tensors = None, []


def give(comm: MPI.Intracomm, contents: Contents) -> None:
    """Take part in the movement as its source."""
    slots = [Slot.of(tensor) for tensor in contents.tensors]
    comm.bcast(dump((contents.skeleton, slots)), comm.rank)
    _broadcast(comm, contents.tensors, comm.rank)


def group(comm: MPI.Intracomm, plan: Transfer) -> MPI.Intracomm | None:
    """The communicator of those who give or receive, the source first; None for the others."""
    ranks = [plan.source, *plan.receivers]
    if comm.rank not in ranks:
        return None
    return comm.Create_group(comm.Get_group().Incl(ranks))


def _broadcast(comm: MPI.Intracomm, tensors: list[torch.Tensor], source: int) -> None:
    staged = [_staging(tensor) for tensor in tensors]
    buffers = [
        buffer[start : start + _CHUNK]
        for stage in staged
        for buffer in (stage.reshape(-1).view(torch.uint8).numpy(),)
        for start in range(0, buffer.size, _CHUNK)
    ]
    if comm.size == 2:
        # The usual case, one spare: all at once, so that nothing waits for a round trip.
        other = 1 - comm.rank
        post = comm.Isend if comm.rank == source else comm.Irecv
        MPI.Request.Waitall([post([buffer, MPI.BYTE], other) for buffer in buffers])
    else:
        for buffer in buffers:
            comm.Bcast([buffer, MPI.BYTE], source)
    if comm.rank != source:
        for tensor, stage in zip(tensors, staged, strict=True):
            if stage.data_ptr() != tensor.data_ptr():
                tensor.copy_(stage)


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` if MPI can use its memory as it is, else a copy that it can use."""
    detached = tensor.detach()
    if detached.device.type == "cpu" and detached.is_contiguous():
        return detached
    return detached.to("cpu", copy=True).contiguous()
