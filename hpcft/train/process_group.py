"""torch.distributed over a recoverable communicator.

A process group whose collectives call MPI on the tensors' own memory; those on a device travel
through pinned host memory. Unmodified DistributedDataParallel and FSDP2 run over it. What is
particular is how it meets failures: the first MPI error is recorded, and from then on collectives
complete at once without doing anything, so that a backward pass comes to its end; the job looks at
:attr:`WorldProcessGroup.failure` at the edges of a step, recovers, and attaches the new
communicator to the same object, so that whatever holds the group (a DDP module) keeps it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpcft.errors import HpcftError
from hpcft.train import ring
from hpcft.train.collectives import Collectives
from hpcft.train.host_memory import HostMemory

_BACKEND = "hpcft"


class Progress(Protocol):
    """Is told when a call that may wait for other ranks begins and ends."""

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class WorldProcessGroup(Collectives):
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
        super().__init__(rank, size)
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
                memory = HostMemory(tensor, reduce=True)
                ring.add_up(comm, ranks, memory.flat)
                memory.settle()

        self._attempt(call, local=_nothing)

    def broadcast_among(self, ranks: Sequence[int], tensors: Sequence[torch.Tensor]) -> None:
        """Give some of the ranks, of which this is one, the first of these's tensors."""

        def call(comm: MPI.Intracomm) -> None:
            for tensor in tensors:
                memory = HostMemory(tensor, fill=comm.rank == ranks[0])
                ring.give(comm, ranks, memory.flat)
                memory.settle()

        self._attempt(call, local=_nothing)

    # -- what torch asks -----------------------------------------------------------------------

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

    # -- calls of MPI --------------------------------------------------------------------------

    def _call(
        self, call: Callable[[MPI.Intracomm], object], *, local: Callable[[], object]
    ) -> bool:
        """Make a collective call of all ranks, as :meth:`_attempt` does.

        Raises
        ------
        HpcftError: the ranks are apart.
        """
        if error := (self._root or self).apart:
            raise error
        return self._attempt(call, local=local)

    def _attempt(
        self, call: Callable[[MPI.Intracomm], object], *, local: Callable[[], object]
    ) -> bool:
        """Make an MPI call, recording its failure; do ``local`` instead when parked or broken."""
        if self._comm is None or self.failure is not None:
            if self.failure is not None and self.refuse:
                self.refuse()
            local()
            return False
        with self.calling():
            call(self._comm)
        return self.failure is None

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


def _nothing() -> None:
    pass


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
