"""Between the memory of devices, such as GPUs, and the engine's pool.

The engine's threads reach host memory alone. For tensors on a device it lends chunks of its pool,
and a :class:`Ferry` copies between these and the device, on a stream beside those of training::

    save      device --Ferry--> chunk --engine: checksum, write--> file
    restore   file --engine: read, checksum--> chunk --Ferry--> device

So the pool is all the memory that is used, and while none of it is free nothing is copied. The
driver is told of the pool ("pinned"), for devices copy by themselves from and to such memory alone.

What is here uses the streams and events that torch has for every accelerator. Host memory has
neither, and needs none: there a copy is done when the call returns.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcft.ckpt._engine import ELSEWHERE, Engine, Loan, Transfer
from hpcft.ckpt.ranks import Memory

if TYPE_CHECKING:
    from typing_extensions import TypeIs

#: Bytes, flat: of an array in the host, or of a tensor on a device.
Bytes = Memory | torch.Tensor

#: Chunks that are being copied at the same time; so many that the device need not wait for us.
_UNDER_WAY = 4
#: Of cudaHostRegister: for all devices.
_PORTABLE = 1
#: Its answer if somebody has done so before.
_ALREADY = 712


def is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether its memory is that of a device."""
    return tensor.device.type not in ("cpu", "meta")


def can_be_lent(tensor: torch.Tensor) -> bool:
    """Whether its bytes can be had as they are, and on a device."""
    as_it_is = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return is_elsewhere(tensor) and as_it_is


def flat(tensor: torch.Tensor) -> Bytes:
    """A contiguous tensor's bytes."""
    found = tensor.detach().reshape(-1).view(torch.uint8)
    return found if is_elsewhere(tensor) else found.numpy()


def beside(like: torch.device, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Host memory that a device copies from and to by itself; not initialised.

    Parameters
    ----------
    like: the device.
    """
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=like.type != "cpu")


def on_device(memory: object) -> TypeIs[torch.Tensor]:
    """Whether the engine has to lend chunks for it."""
    return isinstance(memory, torch.Tensor)


def for_engine(memory: Any) -> Any:
    """What the engine takes for an extent's memory."""
    return ELSEWHERE if on_device(memory) else memory


def in_host(memory: Bytes) -> Memory:
    """The bytes in host memory: the same, or a copy."""
    if on_device(memory):
        found: Memory = memory.cpu().numpy()
        return found
    return memory


def put(into: Bytes, data: Bytes) -> None:
    """Copy bytes, unless they are in the same place."""
    target, source = (m if on_device(m) else torch.from_numpy(m) for m in (into, data))
    if (target.device, target.data_ptr()) != (source.device, source.data_ptr()):
        target.copy_(source)


class _Pin:
    """Memory that the driver has been told of; as long as this object lives."""

    def __init__(self, address: int, size: int, device: torch.device) -> None:
        self._address = address
        self._device = device
        self._pid = os.getpid()
        # Else a context is made on the first device.
        with torch.accelerator.device_index(device.index):
            answer = int(_runtime().cudaHostRegister(address, size, _PORTABLE))
        self._ours = answer == 0
        if answer not in (0, _ALREADY):
            warnings.warn(
                f"hpcft: the staging pool of {size >> 20} MiB cannot be pinned (error {answer} of "
                "cudaHostRegister): saving is slower, and holds training up for longer",
                stacklevel=2,
            )

    def __del__(self) -> None:
        # At the end of the process there may be no driver any more.
        with contextlib.suppress(Exception):
            if self._ours and self._pid == os.getpid():
                with torch.accelerator.device_index(self._device.index):
                    _runtime().cudaHostUnregister(self._address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pin(engine: Engine, device: torch.device) -> None:
    """Pin an engine's pool, once, if that can be done for this kind of device.

    CUDA and ROCm can, under the same name; others copy from memory that is not.
    """
    if device.type == "cuda" and engine.pin is None:
        engine.pin = _Pin(*engine.pool, device)


class _Lane:
    """A stream of a device, beside that of training.

    Parameters
    ----------
    device: which; host memory has no streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.Stream(device=device) if device.type != "cpu" else None

    def follow(self) -> None:
        """Do what comes after what the current stream of this thread has been given so far."""
        if self._stream:
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))

    def follow_all(self) -> None:
        """Do what comes after all that any stream has been given; waits for it."""
        if self._stream:
            torch.accelerator.synchronize(self._device)

    def copy(self, into: torch.Tensor, data: torch.Tensor) -> None:
        """Begin to copy."""
        with self._stream or contextlib.nullcontext():
            into.copy_(data, non_blocking=True)

    def mark(self) -> torch.Event | None:
        """What tells when all is done that this lane has been given so far."""
        if not self._stream:
            return None
        # Who waits for it is to sleep, where devices can have that.
        event = torch.Event(device=self._device, blocking=True)
        event.record(self._stream)
        return event

    def lead(self) -> None:
        """Have the current stream of this thread go on only when this lane is through."""
        if self._stream:
            torch.accelerator.current_stream(self._device).wait_stream(self._stream)


class Ferry:
    """Copies between devices and the chunks that the engine lends.

    Made in the thread that trains: what is saved is what the tensors will hold when the work its
    current streams have been given so far is done.

    Parameters
    ----------
    engine: whose transfer it is.
    memories: of the transfer's extents, by number; those on devices are copied.
    writing: from the devices; else to them.

    Attributes
    ----------
    needed: whether there is anything on a device.
    error: why it could not go on; the transfer is cancelled then.
    """

    def __init__(self, engine: Engine, memories: Sequence[object], writing: bool) -> None:
        self._memories = {i: memory for i, memory in enumerate(memories) if on_device(memory)}
        self.needed = bool(self._memories)
        self._writing = writing
        self._all_begun = threading.Event()
        self._lanes: dict[torch.device, _Lane] = {}
        self.error: Exception | None = None
        for device in {memory.device for memory in self._memories.values()}:
            pin(engine, device)
            lane = self._lanes[device] = _Lane(device)
            # What is to be overwritten may have been made by another thread.
            (lane.follow if writing else lane.follow_all)()

    def run(self, transfer: Transfer) -> None:
        """Copy, until all is copied; to be called once, and, for a save, in a thread."""
        under_way: deque[tuple[Loan, list[torch.Event]]] = deque()
        try:
            while (loan := self._next(transfer, under_way)) is not None:
                under_way.append((loan, self._begin(loan)))
            self._all_begun.set()
            while under_way:
                _land(under_way)
        except Exception as error:
            # What devices may still write to must not be lent to others.
            with contextlib.suppress(Exception):
                for lane in self._lanes.values():
                    lane.follow_all()
            transfer.cancel()
            # Its traceback has loans, too, and the engine waits for them.
            self.error = error.with_traceback(None)
            under_way.clear()
        finally:
            self._all_begun.set()
            self._memories = {}

    def wait_begun(self, timeout: float) -> bool:
        """Wait until all copies have been begun; for what the current stream is given after that
        :meth:`lead` makes sure that it comes after them.

        Parameters
        ----------
        timeout: seconds.
        """
        return self._all_begun.wait(timeout)

    def lead(self) -> None:
        """Have this thread's current streams wait for the copies that have been begun."""
        for lane in self._lanes.values():
            lane.lead()

    def _next(
        self, transfer: Transfer, under_way: deque[tuple[Loan, list[torch.Event]]]
    ) -> Loan | None:
        while under_way:
            if len(under_way) < _UNDER_WAY:
                with contextlib.suppress(TimeoutError):
                    return transfer.borrow(0)
            _land(under_way)
        return transfer.borrow()

    def _begin(self, loan: Loan) -> list[torch.Event]:
        """Begin to copy what is in a chunk; returns what tells when that is done."""
        used: dict[torch.device, _Lane] = {}
        chunk = torch.frombuffer(loan, dtype=torch.uint8) if loan.pieces else None
        for extent, begin, place, length in loan.pieces:
            assert chunk is not None
            memory = self._memories[extent][begin : begin + length]
            here = chunk[place : place + length]
            lane = used[memory.device] = self._lanes[memory.device]
            lane.copy(here, memory) if self._writing else lane.copy(memory, here)
        return _marks(used.values())


class Landing:
    """An engine that reads to devices as well."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def read(
        self, files: Sequence[tuple[str, int, int]], extents: Sequence[tuple[Any, int, int, int]]
    ) -> Transfer:
        """Begin to read; when this returns what is on devices has been read.

        Raises
        ------
        OSError: a device cannot be copied to.
        """
        ferry = Ferry(self._engine, [memory for memory, *_ in extents], writing=False)
        listed = [(for_engine(memory), *rest) for memory, *rest in extents]
        transfer = self._engine.read(files, listed)
        if ferry.needed:
            ferry.run(transfer)
        if ferry.error:
            raise OSError(f"copying to a device has failed: {ferry.error}") from ferry.error
        return transfer


def _marks(lanes: Iterable[_Lane]) -> list[torch.Event]:
    return [event for lane in lanes if (event := lane.mark()) is not None]


def _land(under_way: deque[tuple[Loan, list[torch.Event]]]) -> None:
    """Wait for the chunk that was begun first, and give it back."""
    loan, marks = under_way.popleft()
    for event in marks:
        event.synchronize()
    loan.give_back()
