"""Moving a training state from one rank to others, memory to memory.

What is in host memory goes in place, and all at once. What is on devices follows, in pieces through
a few buffers of pinned host memory, however large it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from mpi4py import MPI

from hpcft.ckpt import device
from hpcft.train.state import Contents, Slot, State, dump, load
from hpcft.world.recovery import Transfer
from hpcft.world.requests import wait_all

#: Bytes of a message; MPI counts are ints in Open MPI 5.
COUNTABLE = 1 << 30
_TAG = 11
#: Bytes of a piece of what is on a device, and how many are on their way at the same time.
_PIECE = 16 << 20
_PIECES = 4
_Buffer = tuple[Any, MPI.Datatype]


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
        parent, children = _neighbours(comm.rank, plan)
        assert parent is not None
        package = comm.recv(None, parent, _TAG)
        self._skeleton, slots = load(package)
        self._tensors = self._rooms(slots)
        here = _in_host(self._tensors)
        staged = [_staging(tensor) for tensor in here]
        wait_all([comm.Irecv(buffer, parent, _TAG) for buffer in buffers(staged)])
        for tensor, stage in zip(here, staged, strict=True):
            if stage.data_ptr() != tensor.data_ptr():
                tensor.copy_(stage)
        _pass_on(comm, children, package, staged)
        _relay(comm, parent, children, self._tensors)

    def _rooms(self, slots: list[Slot]) -> list[torch.Tensor]:
        """Tensors to receive into."""
        live = [tensor.detach() for tensor in self._state.take_apart().tensors]
        if self._in_place and [Slot.of(tensor) for tensor in live] == slots:
            return [_place(tensor) for tensor in live]
        # On this rank's own devices.
        homes = {tensor.device.type: tensor.device for tensor in reversed(live)}
        return [
            torch.empty(slot.shape, dtype=slot.dtype, device=homes.get(slot.device, slot.device))
            for slot in slots
        ]

    def install(self) -> None:
        """Put what has arrived in the place of what this rank had."""
        if self._skeleton is not None:
            self._state.install(self._skeleton, self._tensors)
            self._skeleton, self._tensors = None, []


def give(comm: MPI.Intracomm, plan: Transfer, contents: Contents) -> None:
    """Take part in the movement as its source."""
    slots = [Slot.of(tensor) for tensor in contents.tensors]
    package = dump((contents.skeleton, slots))
    _, children = _neighbours(comm.rank, plan)
    staged = [_staging(tensor) for tensor in _in_host(contents.tensors)]
    _pass_on(comm, children, package, staged)
    _relay(comm, None, children, contents.tensors)


def _neighbours(rank: int, plan: Transfer) -> tuple[int | None, list[int]]:
    """From whom a rank receives and to whom it passes on: a binary tree, the source its root."""
    order = [plan.source, *plan.receivers]
    place = order.index(rank)
    parent = order[(place - 1) // 2] if place else None
    return parent, order[2 * place + 1 : 2 * place + 3]


def _pass_on(
    comm: MPI.Intracomm, children: list[int], package: bytes, staged: list[torch.Tensor]
) -> None:
    requests = [comm.isend(package, child, _TAG) for child in children]
    # All at once, so that nothing waits for a round trip.
    requests += [
        comm.Isend(buffer, child, _TAG) for child in children for buffer in buffers(staged)
    ]
    wait_all(requests)


class _Passage:
    """A piece of what is on a device, on its way through this rank's host memory.

    Parameters
    ----------
    parent: who sends it; None: it comes from the device, and else goes there.
    children: to whom it is sent on.
    room: as much host memory as a piece may need.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        parent: int | None,
        children: list[int],
        piece: torch.Tensor,
        room: torch.Tensor,
    ) -> None:
        self._comm, self._children = comm, children
        self._piece, self._room = piece, room
        self._stage = room[: len(piece)]
        self._received: list[MPI.Request] = []
        self._sent: list[MPI.Request] = []
        if parent is None:
            self._stage.copy_(piece)
            self._send()
        else:
            self._received = [comm.Irecv(buffer, parent, _TAG) for buffer in self._message()]

    def _message(self) -> list[_Buffer]:
        return buffers([self._stage])

    def _send(self) -> None:
        self._sent = [
            self._comm.Isend(buffer, child, _TAG)
            for child in self._children
            for buffer in self._message()
        ]

    def finish(self) -> torch.Tensor:
        """Wait until it is through; returns the room."""
        if self._received:
            wait_all(self._received)
            self._send()
            self._piece.copy_(self._stage)
        wait_all(self._sent)
        return self._room


def _relay(
    comm: MPI.Intracomm, parent: int | None, children: list[int], tensors: list[torch.Tensor]
) -> None:
    """Move what is on devices, piece by piece."""
    under_way: deque[_Passage] = deque()
    for piece in _pieces(tensors):
        if len(under_way) < _PIECES:
            room = device.beside(piece.device, (_PIECE,), torch.uint8)
        else:
            room = under_way.popleft().finish()
        under_way.append(_Passage(comm, parent, children, piece, room))
    for passage in under_way:
        passage.finish()


def _in_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if not device.is_elsewhere(tensor)]


def _pieces(tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        if device.is_elsewhere(tensor):
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            yield from torch.split(flat, _PIECE)


def buffers(staged: list[torch.Tensor]) -> list[_Buffer]:
    """The tensors' memory, in pieces MPI can count."""
    return [
        (buffer[start : start + COUNTABLE], MPI.BYTE)
        for stage in staged
        for buffer in (stage.reshape(-1).view(torch.uint8).numpy(),)
        for start in range(0, buffer.size, COUNTABLE)
    ]


def _place(tensor: torch.Tensor) -> torch.Tensor:
    """A live tensor, if it can be received into, else another like it."""
    if tensor.is_contiguous() or not device.is_elsewhere(tensor):
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _staging(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in host memory, if MPI can use it as it is, else a copy that it can use."""
    return tensor.detach().contiguous()
