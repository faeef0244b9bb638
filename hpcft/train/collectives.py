"""Collectives, sends and receives of torch.distributed, as calls of MPI.

Collectives block, in the thread that torch calls them in; sends and receives do not. Of a tensor on
a device is sent what it holds when the current stream has done what it was given before the call;
and what the stream is given after the call, or after ``wait()``, finds the result.

Whether MPI knows of devices makes no difference. The messaging layer that ULFM works through (ob1)
copies them to host memory itself to add them up, and that is not pinned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpcft.errors import HpcftError
from hpcft.train.host_memory import HostMemory, buffer, elements, put, room
from hpcft.train.works import Done, Pending
from hpcft.world.requests import wait_all

# torch's ReduceOp compares by its own rules, hence a list.
_OPS = [
    (dist.ReduceOp.SUM, MPI.SUM),
    (dist.ReduceOp.AVG, MPI.SUM),
    (dist.ReduceOp.PRODUCT, MPI.PROD),
    (dist.ReduceOp.MIN, MPI.MIN),
    (dist.ReduceOp.MAX, MPI.MAX),
    (dist.ReduceOp.BAND, MPI.BAND),
    (dist.ReduceOp.BOR, MPI.BOR),
    (dist.ReduceOp.BXOR, MPI.BXOR),
]


class Collectives(dist.ProcessGroup):
    """What torch calls; who makes the calls of MPI, and what becomes of a failure, is left open.

    Torch 2.13 has given some of them new names; the older names are still asked for.

    Parameters
    ----------
    rank, size: what to claim.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank = rank
        self._size = size

    @property
    def failure(self) -> BaseException | None:
        """The error that has broken the group; None while all is well."""
        raise NotImplementedError

    def calling(self) -> AbstractContextManager[None]:
        """Around a call of MPI."""
        raise NotImplementedError

    def _call(
        self, call: Callable[[MPI.Intracomm], object], *, local: Callable[[], object]
    ) -> bool:
        """Make a collective call of all ranks, or do ``local`` instead if there are no others.

        Returns
        -------
        Whether the call was made, and has not failed.
        """
        raise NotImplementedError

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def _averaged(self, tensors: Sequence[torch.Tensor], op: Any) -> None:
        """Of the sum make what ``op`` asks for."""
        if op == dist.ReduceOp.AVG:
            for tensor in tensors:
                tensor.div_(self._size)

    # Torch 2.13 has given some of them new names; the older names are still asked for.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        """Reduce each tensor over all ranks, in place."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        op = _op_of(opts)
        mpi_op = _operation(op)

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = HostMemory(tensor, reduce=True)
                comm.Allreduce(MPI.IN_PLACE, memory.buffer, mpi_op)
                memory.settle()

        if self._call(call, local=_nothing):
            self._averaged(tensors, op)
        return Done(tensors)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        """Give every rank the root's tensors."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        root = opts if isinstance(opts, int) else getattr(opts, "rootRank", 0)

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = HostMemory(tensor, fill=comm.rank == root)
                comm.Bcast(memory.buffer, root)
                memory.settle()

        self._call(call, local=_nothing)
        return Done(tensors)

    def reduce(self, tensors: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Reduce each tensor over all ranks, into the root's."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        op, root = _op_of(opts), getattr(opts, "rootRank", 0)
        mpi_op = _operation(op)

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = HostMemory(tensor, reduce=True)
                if comm.rank == root:
                    comm.Reduce(MPI.IN_PLACE, memory.buffer, mpi_op, root)
                    memory.settle()
                else:
                    comm.Reduce(memory.buffer, None, mpi_op, root)

        if self._call(call, local=_nothing) and self._rank == root:
            self._averaged(tensors, op)
        return Done(tensors)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give every rank every rank's tensor."""
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]

        def call(comm: MPI.Intracomm) -> None:
            for parts, own in zip(outputs, inputs, strict=True):
                mine = HostMemory(own)
                whole = room(own, comm.size, mine)
                comm.Allgather(mine.buffer, buffer(whole))
                for part, got in zip(parts, whole.chunk(comm.size), strict=True):
                    put(part, got)

        def local() -> None:
            for parts, own in zip(outputs, inputs, strict=True):
                for part in parts:
                    part.copy_(own)

        self._call(call, local=local)
        return Done(outputs)

    def _allgather_base(self, output: Any, own: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give every rank every rank's tensor, one after the other in ``output``."""

        def call(comm: MPI.Intracomm) -> None:
            target = HostMemory(output, fill=False)
            comm.Allgather(HostMemory(own).buffer, target.buffer)
            target.settle()

        def local() -> None:
            for part in output.view(self._size, -1):
                part.copy_(own.reshape(-1))

        self._call(call, local=local)
        return Done(output)

    def allgather_into_tensor_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self._allgather_base(output, own)
        return Done(outputs)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        for position, own in enumerate(inputs):
            self.allgather([[parts[position] for parts in outputs]], [own])
        return Done(outputs)

    def _reduce_scatter_base(self, output: Any, whole: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Reduce ``whole`` over all ranks; each keeps its part."""
        op = _op_of(opts)
        mpi_op = _operation(op)

        def call(comm: MPI.Intracomm) -> None:
            target = HostMemory(output, reduce=True, fill=False)
            comm.Reduce_scatter_block(HostMemory(whole, reduce=True).buffer, target.buffer, mpi_op)
            target.settle()

        def local() -> None:
            output.copy_(whole.reshape(self._size, -1)[self._rank].view_as(output))

        if self._call(call, local=local):
            self._averaged([output], op)
        return Done(output)

    def reduce_scatter_tensor_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> dist.Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole, opts)
        return Done(outputs)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        for output, parts in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, torch.cat([p.reshape(-1) for p in parts]), opts)
        return Done(outputs)

    all_gather_single = _allgather_base  # type: ignore[assignment]
    all_gather_single_coalesced = allgather_into_tensor_coalesced  # type: ignore[assignment]
    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced  # type: ignore[assignment]

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give the root every rank's tensor."""
        root = getattr(opts, "rootRank", 0)

        def call(comm: MPI.Intracomm) -> None:
            mine = HostMemory(inputs[0])
            if comm.rank != root:
                comm.Gather(mine.buffer, None, root)
                return
            whole = room(inputs[0], comm.size, mine)
            comm.Gather(mine.buffer, buffer(whole), root)
            for part, got in zip(outputs[0], whole.chunk(comm.size), strict=True):
                put(part, got)

        def local() -> None:
            for part in outputs[0] if outputs else []:
                part.copy_(inputs[0])

        self._call(call, local=local)
        return Done(outputs)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give every rank its part of the root's tensors."""
        root = getattr(opts, "rootRank", 0)

        def call(comm: MPI.Intracomm) -> None:
            target = HostMemory(outputs[0], fill=False)
            whole = None
            if comm.rank == root:
                whole = HostMemory(torch.cat([p.detach().reshape(-1) for p in inputs[0]])).buffer
            comm.Scatter(whole, target.buffer, root)
            target.settle()

        def local() -> None:
            if inputs:
                outputs[0].copy_(inputs[0][self._rank])

        self._call(call, local=local)
        return Done(outputs)

    def alltoall_base(
        self, output: Any, whole: Any, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> dist.Work:
        """Each rank gives each rank a slice."""

        def call(comm: MPI.Intracomm) -> None:
            target, source = HostMemory(output, fill=False), HostMemory(whole)
            if not output_splits and not input_splits:
                comm.Alltoall(source.buffer, target.buffer)
            else:
                # Splits count rows; MPI counts what its type counts.
                row_in = elements(source) // max(whole.shape[0], 1)
                row_out = elements(target) // max(output.shape[0], 1)
                even_in = [whole.shape[0] // comm.size] * comm.size
                even_out = [output.shape[0] // comm.size] * comm.size
                sent = [n * row_in for n in (input_splits or even_in)]
                got = [n * row_out for n in (output_splits or even_out)]
                (data_in, kind), (data_out, _) = source.buffer, target.buffer
                comm.Alltoallv([data_in, sent, kind], [data_out, got, kind])
            target.settle()

        def local() -> None:
            if output.shape == whole.shape:
                output.copy_(whole)
            else:
                output.zero_()

        self._call(call, local=local)
        return Done(output)

    all_to_all_single = alltoall_base  # type: ignore[assignment]

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        def call(comm: MPI.Intracomm) -> None:
            targets = [HostMemory(tensor, fill=False) for tensor in outputs]
            requests = [
                comm.Irecv(target.buffer, source=peer) for peer, target in enumerate(targets)
            ]
            sources = [HostMemory(tensor) for tensor in inputs]
            requests += [comm.Isend(source.buffer, peer) for peer, source in enumerate(sources)]
            wait_all(requests)
            for target in targets:
                target.settle()

        def local() -> None:
            for output, own in zip(outputs, inputs, strict=True):
                if output.shape == own.shape:
                    output.copy_(own)

        self._call(call, local=local)
        return Done(outputs)

    def barrier(self, opts: Any = None, *_: Any) -> dist.Work:
        """Wait until all ranks have come here."""
        self._call(lambda comm: comm.Barrier(), local=_nothing)
        return Done([])

    def send(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        memories = [HostMemory(tensor) for tensor in tensors]
        return self._post(lambda comm, memory: comm.Isend(memory.buffer, peer, tag), memories, [])

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        memories = [HostMemory(tensor, fill=False) for tensor in tensors]
        return self._post(
            lambda comm, memory: comm.Irecv(memory.buffer, peer, tag), memories, memories
        )

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    def _post(
        self,
        post: Callable[[MPI.Intracomm, HostMemory], MPI.Request],
        memories: list[HostMemory],
        received: list[HostMemory],
    ) -> dist.Work:
        requests: list[MPI.Request] = []

        def call(comm: MPI.Intracomm) -> None:
            requests.extend(post(comm, memory) for memory in memories)

        self._call(call, local=_nothing)
        return Pending(self, requests, received)


def _nothing() -> None:
    pass


def _operation(op: Any) -> MPI.Op:
    for ours, theirs in _OPS:
        if op == ours:
            return theirs
    raise HpcftError(
        f"the backend hpcft cannot reduce with {op}", "use SUM, AVG, MIN, MAX, PRODUCT"
    )


def _op_of(opts: Any) -> Any:
    if opts is None:
        return dist.ReduceOp.SUM
    return getattr(opts, "reduceOp", opts)
