"""torch.distributed over a recoverable communicator.

A process group whose collectives call MPI on the tensors' own memory; those on a device travel
through pinned host memory. Unmodified DistributedDataParallel and FSDP2 run over it. What is
particular is how it meets failures: the first MPI error is recorded, and from then on collectives
complete at once without doing anything, so that a backward pass comes to its end; the job looks at
:attr:`WorldProcessGroup.failure` at the edges of a step, recovers, and attaches the new
communicator to the same object, so that whatever holds the group (a DDP module) keeps it.

Collectives block, in the thread that torch calls them in; sends and receives do not. Of a tensor on
a device is sent what it holds when the current stream has done what it was given before the call;
and what the stream is given after the call, or after ``wait()``, finds the result.

Whether MPI knows of devices makes no difference. The messaging layer that ULFM works through (ob1)
copies them to host memory itself to add them up, and that is not pinned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.futures import Future
from torch.utils import _pytree as pytree

from hpcft.ckpt import device
from hpcft.errors import HpcftError
from hpcft.train import ring
from hpcft.world.requests import all_done, wait_all

_BACKEND = "hpcft"

_TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.uint8: MPI.UINT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.bool: MPI.C_BOOL,
}

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


class Progress(Protocol):
    """Is told when a call that may wait for other ranks begins and ends."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class _Done(dist.Work):
    """A collective that is complete."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result

    def get_future(self) -> Future[Any]:
        return completed(self._result)


def completed(result: Any) -> Future[Any]:
    """A future of a result that is there, or that the current streams are about to make."""
    leaves = pytree.tree_leaves(result)
    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    future: Future[Any] = Future(devices=[d for d in devices if d.type != "cpu"])
    future.set_result(result)
    return future


class _Pending(dist.Work):
    """A message on its way.

    Parameters
    ----------
    group: whose call it is; records a failure, as in a collective.
    requests: what MPI knows of it.
    memories: what is received into.
    """

    def __init__(
        self, group: WorldProcessGroup, requests: list[MPI.Request], memories: list[_Memory]
    ) -> None:
        super().__init__()
        self._group = group
        self._requests = requests
        self._memories = memories

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._finish(lambda: wait_all(self._requests))
        return True

    def is_completed(self) -> bool:
        return not self._requests or self._finish(lambda: all_done(self._requests))

    def is_success(self) -> bool:
        return self.is_completed()

    def _finish(self, finish: Callable[[], bool]) -> bool:
        done = True
        if self._requests and self._group.failure is None:
            with self._group.calling():
                done = finish()
            if done and self._group.failure is None:
                for memory in self._memories:
                    memory.settle()
        if done:
            self._requests, self._memories = [], []
        return done


def _operation(op: Any) -> MPI.Op:
    for ours, theirs in _OPS:
        if op == ours:
            return theirs
    raise HpcftError(
        f"the backend hpcft cannot reduce with {op}", "use SUM, AVG, MIN, MAX, PRODUCT"
    )


class _Memory:
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
        if reduce and work.dtype not in _TYPES:
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
        return _buffer(self.flat)

    def settle(self) -> None:
        """Bring the result to the tensor, if it is not there yet."""
        if not self._direct:
            _put(self._tensor, self.flat)


def _buffer(flat: torch.Tensor) -> tuple[Any, MPI.Datatype]:
    kind = _TYPES.get(flat.dtype)
    if kind is None:
        return flat.view(torch.uint8).numpy(), MPI.BYTE
    return flat.numpy(), kind


class WorldProcessGroup(dist.ProcessGroup):
    """The ranks that train, as a process group of torch.

    It starts parked: collectives are local, so that a spare can run a training step by itself.
    Reductions and broadcasts leave a tensor as it is, gathers give copies of this rank's.

    Parameters
    ----------
    rank, size: what to claim until :meth:`attach`.
    progress: is told of blocking calls.
    root: the group of all ranks of which this one has some; None if it is that itself.

    Attributes
    ----------
    failure: the first MPI error since the last :meth:`attach`, None while all is well; the same for
        a group and its subgroups, for a rank that has failed is missing in the end from all.
    refuse: called when a failure is met, until a script is past what it cannot take back.
    apart: why collectives cannot be called, as the ranks are not at the same step; None if they
        can. The same for a group and its subgroups.
    """

    def __init__(
        self, rank: int, size: int, progress: Progress, root: WorldProcessGroup | None = None
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank = rank
        self._size = size
        self._progress = progress
        self._name = self._description = ""
        self._comm: MPI.Intracomm | None = None
        self._subgroups: list[tuple[WorldProcessGroup, tuple[int, ...]]] = []
        self._root = root
        self._failure: BaseException | None = None
        self._refuse: Callable[[], None] | None = None
        self.apart: HpcftError | None = None

    @property
    def failure(self) -> BaseException | None:
        return self._root.failure if self._root else self._failure

    @failure.setter
    def failure(self, failure: BaseException | None) -> None:
        if self._root:
            self._root.failure = failure
        else:
            self._failure = failure

    @property
    def refuse(self) -> Callable[[], None] | None:
        return self._root.refuse if self._root else self._refuse

    @refuse.setter
    def refuse(self, refuse: Callable[[], None] | None) -> None:
        self._refuse = refuse

    # -- what the job does with it -------------------------------------------------------------

    def attach(self, comm: MPI.Intracomm) -> None:
        """Use ``comm`` from now on; rank and size are its.

        Subgroups of all ranks are attached to a duplicate of it.

        Raises
        ------
        HpcftError: there is a subgroup of some ranks only, whose place in the new world nobody
            knows.
        MPI.Exception: somebody failed meanwhile.
        """
        if self._comm is not None or comm.size != self._size:
            for _, ranks in self._subgroups:
                if len(ranks) != self._size:
                    raise HpcftError(
                        f"the script uses a process group of ranks {list(ranks)}, which cannot be "
                        "healed in place",
                        "use groups of all ranks",
                    )
        self._comm, self._rank, self._size = comm, comm.rank, comm.size
        self.failure = self.apart = None
        for group, _ in self._subgroups:
            group.attach(comm.Dup())

    def revoke(self) -> None:
        """Have all ranks leave the collectives of subgroups; those they have with a rank that has
        left them for a recovery would never end."""
        for group, _ in self._subgroups:
            if group._comm is not None:
                group._comm.Revoke()

    def park(self, rank: int, size: int) -> None:
        """Make collectives local, claiming to be ``rank`` of ``size``."""
        self._comm, self._rank, self._size = None, rank, size
        self.failure = None
        for group, _ in self._subgroups:
            group.park(group.rank(), group.size())

    @property
    def healable(self) -> bool:
        """Whether :meth:`attach` can give it other ranks."""
        return all(len(ranks) == self._size for _, ranks in self._subgroups)

    def subgroup(self, ranks: Sequence[int], alone: bool = False) -> WorldProcessGroup | None:
        """A group of some of the ranks, for ``dist.new_group``; None in a rank that is not in it.

        Parameters
        ----------
        alone: only these ranks make the call, and not all. Should one of them die meanwhile the
            others hang: MPI_Comm_create_group of Open MPI 5.0 notices neither failures nor that the
            communicator has been revoked.
        """
        rank = ranks.index(self._rank) if self._rank in ranks else None
        group = None
        if rank is not None:
            group = WorldProcessGroup(rank, len(ranks), self._progress, self)
            self._subgroups.append((group, tuple(ranks)))

        def call(comm: MPI.Intracomm) -> None:
            if alone:
                made = comm.Create_group(comm.Get_group().Incl(list(ranks)))
            else:
                made = cast(
                    MPI.Intracomm, comm.Split(MPI.UNDEFINED if rank is None else 0, rank or 0)
                )
            if group is not None:
                group.attach(made)

        self._call(call, local=_nothing)
        return group

    def allreduce_among(self, ranks: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Add up tensors over some of the ranks, of which this is one, in place."""

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = _Memory(tensor, reduce=True)
                ring.add_up(comm, ranks, memory.flat)
                memory.settle()

        self._attempt(call, local=_nothing)

    def broadcast_among(self, ranks: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Give some of the ranks, of which this is one, the first of these's tensors."""

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = _Memory(tensor, fill=comm.rank == ranks[0])
                ring.give(comm, ranks, memory.flat)
                memory.settle()

        self._attempt(call, local=_nothing)

    # -- what torch asks -----------------------------------------------------------------------

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    # These names are those of the C++ methods they override.

    def getBackendName(self) -> str:  # noqa: N802
        return _BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802
        self._description = description

    def new_group(
        self,
        ranks: Sequence[int],
        timeout: Any = None,
        pg_options: Any = None,
        group_name: str = "",
        group_desc: str = "",
    ) -> WorldProcessGroup | None:
        """What ``dist.new_group`` comes to, in all ranks.

        With ``use_local_synchronization`` only the group's own come here; torch then makes up a
        name of the ranks, where it otherwise counts.
        """
        group = self.subgroup(ranks, alone=not group_name.isdigit())
        if group is not None:
            group.setGroupName(group_name)
            group.setGroupDesc(group_desc or "undefined")
        return group

    def _call(
        self, call: Callable[[MPI.Intracomm], object], *, local: Callable[[], object]
    ) -> None:
        """Make a collective call of all ranks, as :meth:`_attempt` does.

        Raises
        ------
        HpcftError: the ranks are apart.
        """
        if error := (self._root or self).apart:
            raise error
        self._attempt(call, local=local)

    def _attempt(
        self, call: Callable[[MPI.Intracomm], object], *, local: Callable[[], object]
    ) -> None:
        """Make an MPI call, recording its failure; do ``local`` instead when parked or broken."""
        if self._comm is None or self.failure is not None:
            if self.failure is not None and self.refuse:
                self.refuse()
            local()
            return
        with self.calling():
            call(self._comm)

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Around a call of MPI: tells that it may wait for others, and records its failure."""
        comm = self._comm
        self._progress.enter()
        try:
            yield
            if comm is not None and comm.Is_revoked():
                # Open MPI 5.0 has been seen to leave a collective that was cut short without an
                # error. (That a rank has died, rather than another has revoked, the job knows.)
                self.failure = MPI.Exception(MPI.ERR_REVOKED)
        except MPI.Exception as error:
            self.failure = error
        finally:
            self._progress.leave()
        if self.failure is not None and self.refuse:
            self.refuse()

    def _reduced(self, tensors: Sequence[torch.Tensor], op: Any) -> None:
        if op == dist.ReduceOp.AVG and self._comm is not None and self.failure is None:
            for tensor in tensors:
                tensor.div_(self._size)

    # -- collectives ---------------------------------------------------------------------------
    # Torch 2.13 has given some of them new names; the older names are still asked for.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        """Reduce each tensor over all ranks, in place."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        op = _op_of(opts)
        mpi_op = _operation(op)

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = _Memory(tensor, reduce=True)
                comm.Allreduce(MPI.IN_PLACE, memory.buffer, mpi_op)
                memory.settle()

        self._call(call, local=_nothing)
        self._reduced(tensors, op)
        return _Done(tensors)

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        """Give every rank the root's tensors."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        root = opts if isinstance(opts, int) else getattr(opts, "rootRank", 0)

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = _Memory(tensor, fill=comm.rank == root)
                comm.Bcast(memory.buffer, root)
                memory.settle()

        self._call(call, local=_nothing)
        return _Done(tensors)

    def reduce(self, tensors: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Reduce each tensor over all ranks, into the root's."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        op, root = _op_of(opts), getattr(opts, "rootRank", 0)
        mpi_op = _operation(op)

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = _Memory(tensor, reduce=True)
                if comm.rank == root:
                    comm.Reduce(MPI.IN_PLACE, memory.buffer, mpi_op, root)
                    memory.settle()
                else:
                    comm.Reduce(memory.buffer, None, mpi_op, root)

        self._call(call, local=_nothing)
        if self._rank == root:
            self._reduced(tensors, op)
        return _Done(tensors)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give every rank every rank's tensor."""
        if isinstance(inputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]

        def call(comm: MPI.Intracomm) -> None:
            for parts, own in zip(outputs, inputs, strict=True):
                mine = _Memory(own)
                whole = _room(own, comm.size, mine)
                comm.Allgather(mine.buffer, _buffer(whole))
                for part, got in zip(parts, whole.chunk(comm.size), strict=True):
                    _put(part, got)

        def local() -> None:
            for parts, own in zip(outputs, inputs, strict=True):
                for part in parts:
                    part.copy_(own)

        self._call(call, local=local)
        return _Done(outputs)

    def _allgather_base(self, output: Any, own: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give every rank every rank's tensor, one after the other in ``output``."""

        def call(comm: MPI.Intracomm) -> None:
            target = _Memory(output, fill=False)
            comm.Allgather(_Memory(own).buffer, target.buffer)
            target.settle()

        def local() -> None:
            for part in output.view(self._size, -1):
                part.copy_(own.reshape(-1))

        self._call(call, local=local)
        return _Done(output)

    def allgather_into_tensor_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> dist.Work:
        for output, own in zip(outputs, inputs, strict=True):
            self._allgather_base(output, own)
        return _Done(outputs)

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        for position, own in enumerate(inputs):
            self.allgather([[parts[position] for parts in outputs]], [own])
        return _Done(outputs)

    def _reduce_scatter_base(self, output: Any, whole: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Reduce ``whole`` over all ranks; each keeps its part."""
        op = _op_of(opts)
        mpi_op = _operation(op)

        def call(comm: MPI.Intracomm) -> None:
            target = _Memory(output, reduce=True, fill=False)
            comm.Reduce_scatter_block(_Memory(whole, reduce=True).buffer, target.buffer, mpi_op)
            target.settle()

        def local() -> None:
            output.copy_(whole.reshape(self._size, -1)[self._rank].view_as(output))

        self._call(call, local=local)
        self._reduced([output], op)
        return _Done(output)

    def reduce_scatter_tensor_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> dist.Work:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole, opts)
        return _Done(outputs)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        if isinstance(outputs, torch.Tensor):
            outputs, inputs = [outputs], [inputs]
        for output, parts in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, torch.cat([p.reshape(-1) for p in parts]), opts)
        return _Done(outputs)

    all_gather_single = _allgather_base  # type: ignore[assignment]
    all_gather_single_coalesced = allgather_into_tensor_coalesced  # type: ignore[assignment]
    reduce_scatter_single = _reduce_scatter_base  # type: ignore[assignment]
    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced  # type: ignore[assignment]

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give the root every rank's tensor."""
        root = getattr(opts, "rootRank", 0)

        def call(comm: MPI.Intracomm) -> None:
            mine = _Memory(inputs[0])
            if comm.rank != root:
                comm.Gather(mine.buffer, None, root)
                return
            whole = _room(inputs[0], comm.size, mine)
            comm.Gather(mine.buffer, _buffer(whole), root)
            for part, got in zip(outputs[0], whole.chunk(comm.size), strict=True):
                _put(part, got)

        def local() -> None:
            for part in outputs[0] if outputs else []:
                part.copy_(inputs[0])

        self._call(call, local=local)
        return _Done(outputs)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, *_: Any) -> dist.Work:
        """Give every rank its part of the root's tensors."""
        root = getattr(opts, "rootRank", 0)

        def call(comm: MPI.Intracomm) -> None:
            target = _Memory(outputs[0], fill=False)
            whole = None
            if comm.rank == root:
                whole = _Memory(torch.cat([p.detach().reshape(-1) for p in inputs[0]])).buffer
            comm.Scatter(whole, target.buffer, root)
            target.settle()

        def local() -> None:
            if inputs:
                outputs[0].copy_(inputs[0][self._rank])

        self._call(call, local=local)
        return _Done(outputs)

    def alltoall_base(
        self, output: Any, whole: Any, output_splits: Any, input_splits: Any, opts: Any = None
    ) -> dist.Work:
        """Each rank gives each rank a slice."""

        def call(comm: MPI.Intracomm) -> None:
            target, source = _Memory(output, fill=False), _Memory(whole)
            if not output_splits and not input_splits:
                comm.Alltoall(source.buffer, target.buffer)
            else:
                # Splits count rows; MPI counts what its type counts.
                row_in = _elements(source) // max(whole.shape[0], 1)
                row_out = _elements(target) // max(output.shape[0], 1)
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
        return _Done(output)

    all_to_all_single = alltoall_base  # type: ignore[assignment]

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        def call(comm: MPI.Intracomm) -> None:
            targets = [_Memory(tensor, fill=False) for tensor in outputs]
            requests = [
                comm.Irecv(target.buffer, source=peer) for peer, target in enumerate(targets)
            ]
            sources = [_Memory(tensor) for tensor in inputs]
            requests += [comm.Isend(source.buffer, peer) for peer, source in enumerate(sources)]
            wait_all(requests)
            for target in targets:
                target.settle()

        def local() -> None:
            for output, own in zip(outputs, inputs, strict=True):
                if output.shape == own.shape:
                    output.copy_(own)

        self._call(call, local=local)
        return _Done(outputs)

    def barrier(self, opts: Any = None, *_: Any) -> dist.Work:
        """Wait until all ranks have come here."""
        self._call(lambda comm: comm.Barrier(), local=_nothing)
        return _Done([])

    def send(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        memories = [_Memory(tensor) for tensor in tensors]
        return self._post(lambda comm, memory: comm.Isend(memory.buffer, peer, tag), memories, [])

    def recv(self, tensors: Any, peer: int, tag: int = 0) -> dist.Work:
        memories = [_Memory(tensor, fill=False) for tensor in tensors]
        return self._post(
            lambda comm, memory: comm.Irecv(memory.buffer, peer, tag), memories, memories
        )

    def recv_anysource(self, tensors: Any, tag: int = 0) -> dist.Work:
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    def _post(
        self,
        post: Callable[[MPI.Intracomm, _Memory], MPI.Request],
        memories: list[_Memory],
        received: list[_Memory],
    ) -> dist.Work:
        requests: list[MPI.Request] = []

        def call(comm: MPI.Intracomm) -> None:
            requests.extend(post(comm, memory) for memory in memories)

        self._call(call, local=_nothing)
        return _Pending(self, requests, received)


def _nothing() -> None:
    pass


def _op_of(opts: Any) -> Any:
    if opts is None:
        return dist.ReduceOp.SUM
    return getattr(opts, "reduceOp", opts)


def _put(part: torch.Tensor, got: torch.Tensor) -> None:
    """Bring to a tensor what has come for it; on a device when its current stream comes to it."""
    target = torch.view_as_real(part) if part.is_complex() else part
    if got.dtype != target.dtype:
        # Converted there.
        got = got.to(target.device, non_blocking=True)
    target.copy_(got.view_as(target), non_blocking=True)


def _room(like: torch.Tensor, ranks: int, mine: _Memory) -> torch.Tensor:
    """Host memory for what all ranks have of a tensor."""
    return device.beside(like.device, (ranks * mine.flat.numel(),), mine.flat.dtype)


def _elements(memory: _Memory) -> int:
    data, _ = memory.buffer
    return int(data.size)


def install(group: WorldProcessGroup) -> None:
    """Make ``group`` torch.distributed's default process group, as backend ``hpcft``."""
    made = False

    def create(options: Any, _: Any = None) -> WorldProcessGroup:
        nonlocal made
        if not made:
            made = True
            return group
        # Where torch does not know WorldProcessGroup.new_group (before 2.13).
        subgroup = group.subgroup(list(options.global_ranks_in_group), alone=True)
        assert subgroup is not None
        return subgroup

    accelerator = torch.accelerator.current_accelerator()
    devices = sorted({"cpu", "cuda", *([accelerator.type] if accelerator else [])})
    dist.Backend.register_backend(_BACKEND, create, extended_api=True, devices=devices)
    # Nothing is exchanged through the store: MPI has brought the ranks together.
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(_BACKEND, store=store, rank=group.rank(), world_size=group.size())
