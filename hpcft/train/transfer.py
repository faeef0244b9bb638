"""Moving a training state from one rank to others, memory to memory."""

from __future__ import annotations

from typing import Any

import torch
from mpi4py import MPI

from hpcft.train.state import Contents, Slot, State, dump, load
from hpcft.world.recovery import Transfer
from hpcft.world.requests import wait_all

#: MPI counts are ints in Open MPI 5.
_CHUNK = 1 << 30
_TAG = 11


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

    def receive(self, comm: MPI.Intracomm, plan: Transfer) -> None:
        """Take part in the movement as a receiver."""
        parent, _ = _neighbours(comm.rank, plan)
        assert parent is not None
        package = comm.recv(None, parent, _TAG)
        self._skeleton, slots = load(package)
        live = self._state.take_apart().tensors if self._in_place else []
        fits = [Slot.of(tensor) for tensor in live] == slots
        self._tensors = (
            live if fits else [torch.empty(s.shape, dtype=s.dtype, device=s.device) for s in slots]
        )
        staged = [_staging(tensor) for tensor in self._tensors]
        wait_all([comm.Irecv(buffer, parent, _TAG) for buffer in _buffers(staged)])
        for tensor, stage in zip(self._tensors, staged, strict=True):
            if stage.data_ptr() != tensor.data_ptr():
                tensor.copy_(stage)
        _pass_on(comm, plan, package, staged)

    def install(self) -> None:
        """Put what has arrived in the place of what this rank had."""
        if self._skeleton is not None:
            self._state.install(self._skeleton, self._tensors)
            self._skeleton, self._tensors = None, []


def give(comm: MPI.Intracomm, plan: Transfer, contents: Contents) -> None:
    """Take part in the movement as its source."""
    slots = [Slot.of(tensor) for tensor in contents.tensors]
    package = dump((contents.skeleton, slots))
    _pass_on(comm, plan, package, [_staging(tensor) for tensor in contents.tensors])


def _neighbours(rank: int, plan: Transfer) -> tuple[int | None, list[int]]:
    """From whom a rank receives and to whom it passes on: a binary tree, the source its root."""
    order = [plan.source, *plan.receivers]
    place = order.index(rank)
    parent = order[(place - 1) // 2] if place else None
    return parent, order[2 * place + 1 : 2 * place + 3]


def _pass_on(
    comm: MPI.Intracomm, plan: Transfer, package: bytes, staged: list[torch.Tensor]
) -> None:
    _, children = _neighbours(comm.rank, plan)
    requests = [comm.isend(package, child, _TAG) for child in children]
    # All at once, so that nothing waits for a round trip.
    requests += [
        comm.Isend(buffer, child, _TAG) for child in children for buffer in _buffers(staged)
    ]
    wait_all(requests)


def _buffers(staged: list[torch.Tensor]) -> list[tuple[Any, MPI.Datatype]]:
    """The tensors' memory, in pieces MPI can count."""
    return [
        (buffer[start : start + _CHUNK], MPI.BYTE)
        for stage in staged
        for buffer in (stage.reshape(-1).view(torch.uint8).numpy(),)
        for start in range(0, buffer.size, _CHUNK)
    ]


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` if MPI can use its memory as it is, else a copy that it can use."""
    detached = tensor.detach()
    if detached.device.type == "cpu" and detached.is_contiguous():
        return detached
    return detached.to("cpu", copy=True).contiguous()
