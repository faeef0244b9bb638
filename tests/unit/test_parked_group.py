"""The process group while it is parked, attached, and broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mpi4py import MPI

from hpcft.errors import HpcftError
from hpcft.train.process_group import WorldProcessGroup

RANK, SIZE = 1, 3


class Calls:
    """Is told of blocking calls."""

    def __init__(self) -> None:
        self.entered = self.left = 0

    def enter(self) -> None:
        self.entered += 1

    def leave(self) -> None:
        self.left += 1


class Twins:
    """A communicator of two ranks of which each always has what the other has."""

    rank, size = 0, 2

    def __init__(self) -> None:
        self.failing = False
        self.revoked = False

    def Is_revoked(self) -> bool:  # noqa: N802
        return self.revoked

    def Allreduce(self, source: object, target: Any, op: MPI.Op) -> None:  # noqa: N802
        if self.failing:
            raise MPI.Exception(MPI.ERR_OTHER)
        assert op == MPI.SUM
        data, _ = target
        data *= 2

    def Dup(self) -> Twins:  # noqa: N802
        return Twins()


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def group(calls: Calls) -> WorldProcessGroup:
    return WorldProcessGroup(RANK, SIZE, calls)


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def filled(tensors: list[torch.Tensor], like: torch.Tensor) -> bool:
    return all(torch.equal(tensor, like) for tensor in tensors)


def averaging() -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.AVG
    return options


def test_a_parked_group_claims_what_it_was_told(group: WorldProcessGroup) -> None:
    assert (group.rank(), group.size()) == (RANK, SIZE)
    group.park(2, 5)
    assert (group.rank(), group.size()) == (2, 5)


@pytest.mark.parametrize("options", [None, averaging()], ids=["sum", "average"])
def test_a_parked_group_leaves_a_reduced_tensor_as_it_is(
    group: WorldProcessGroup, options: Any
) -> None:
    tensor = numbers(4)
    work = group.allreduce([tensor], options)
    assert work.wait()
    assert work.is_completed()
    assert torch.equal(tensor, numbers(4))
    assert work.get_future().value()[0] is tensor


def test_a_parked_group_gathers_its_own_from_everyone(group: WorldProcessGroup) -> None:
    own = numbers(2, 2)
    parts = [torch.empty(2, 2) for _ in range(SIZE)]
    group.allgather([parts], [own])
    assert filled(parts, own)
    whole = torch.empty(SIZE * 2, 2)
    group._allgather_base(whole, own)
    assert filled(list(whole.chunk(SIZE)), own)
    gathered = [torch.empty(2, 2) for _ in range(SIZE)]
    group.gather([gathered], [own])
    assert filled(gathered, own)


def test_a_parked_group_keeps_its_part_of_what_is_scattered(group: WorldProcessGroup) -> None:
    whole, part = numbers(SIZE * 2), torch.empty(2)
    group._reduce_scatter_base(part, whole)
    assert part.tolist() == [2, 3]
    parts = list(numbers(SIZE, 2) + 10)
    group.reduce_scatter([part], [parts])
    assert part.tolist() == [12, 13]
    group.scatter([part], [[p + 10 for p in parts]])
    assert part.tolist() == [22, 23]


def test_a_parked_group_waits_for_nobody(group: WorldProcessGroup, calls: Calls) -> None:
    tensor = numbers(2)
    group.barrier()
    group.broadcast([tensor])
    group.send([tensor], 0)
    group.recv([tensor], 0)
    group.reduce([tensor])
    assert torch.equal(tensor, numbers(2))
    assert (calls.entered, calls.left) == (0, 0)
    assert group.failure is None


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: numbers(6), id="as it is"),
        pytest.param(lambda: numbers(6).long(), id="integers"),
        pytest.param(lambda: numbers(3, 2).t(), id="transposed"),
        pytest.param(lambda: numbers(12)[::2], id="spread"),
        pytest.param(lambda: numbers(6).bfloat16(), id="bfloat16"),
        pytest.param(lambda: torch.complex(numbers(3), numbers(3) + 1), id="complex"),
        pytest.param(lambda: torch.tensor(3.0), id="scalar"),
    ],
)
def test_tensors_of_all_kinds_are_reduced_in_place(
    group: WorldProcessGroup, calls: Calls, make: Callable[[], torch.Tensor]
) -> None:
    group.attach(Twins())  # type: ignore[arg-type]
    assert (group.rank(), group.size()) == (0, 2)
    tensor, expected = make(), make() * 2
    place = tensor.data_ptr()
    group.allreduce([tensor])
    assert torch.equal(tensor, expected)
    assert (tensor.dtype, tensor.data_ptr()) == (expected.dtype, place)
    assert (calls.entered, calls.left) == (1, 1)


def test_an_average_is_divided_by_the_size_of_the_world_there_is(group: WorldProcessGroup) -> None:
    group.attach(Twins())  # type: ignore[arg-type]
    tensor = numbers(4)
    group.allreduce([tensor], averaging())
    assert torch.equal(tensor, numbers(4))


def test_a_collective_cut_short_by_a_revoke_is_a_failure_even_without_an_error() -> None:
    group = WorldProcessGroup(0, 2, Calls())
    world = Twins()
    group.attach(world)  # type: ignore[arg-type]
    world.revoked = True
    group.allreduce([torch.ones(2)])
    assert group.failure is not None
    assert isinstance(group.failure, MPI.Exception)
    assert group.failure.Get_error_class() == MPI.ERR_REVOKED


def test_after_the_first_error_collectives_are_local_until_there_is_a_new_world(
    group: WorldProcessGroup, calls: Calls
) -> None:
    broken = Twins()
    group.attach(broken)  # type: ignore[arg-type]
    broken.failing = True
    tensor = numbers(4)
    assert group.allreduce([tensor], averaging()).wait()
    first = group.failure
    assert isinstance(first, MPI.Exception)
    assert (calls.entered, calls.left) == (1, 1)
    broken.failing = False
    group.allreduce([tensor])
    group.barrier()
    assert group.failure is first
    assert (calls.entered, calls.left) == (1, 1)
    assert torch.equal(tensor, numbers(4))
    group.attach(Twins())  # type: ignore[arg-type]
    assert group.failure is None
    group.allreduce([tensor])
    assert torch.equal(tensor, numbers(4) * 2)


def test_a_script_error_within_a_collective_is_no_failure_of_a_rank(
    group: WorldProcessGroup, calls: Calls
) -> None:
    group.attach(Twins())  # type: ignore[arg-type]
    # The twins cannot multiply.
    options = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.PRODUCT
    with pytest.raises(AssertionError):
        group.allreduce([numbers(2)], options)
    assert group.failure is None
    assert (calls.entered, calls.left) == (1, 1)


def test_subgroups_of_all_ranks_follow_into_a_new_world_and_others_cannot(
    group: WorldProcessGroup,
) -> None:
    everyone = group.subgroup([0, 1, 2])
    assert (everyone.rank(), everyone.size()) == (1, 3)
    group.attach(Twins())  # type: ignore[arg-type]
    assert (everyone.rank(), everyone.size()) == (0, 2)

    torn = WorldProcessGroup(RANK, SIZE, Calls())
    some = torn.subgroup([1, 2])
    assert (some.rank(), some.size()) == (0, 2)
    with pytest.raises(HpcftError, match=r"\[1, 2\]") as caught:
        torn.attach(Twins())  # type: ignore[arg-type]
    assert caught.value.remedy


def test_the_real_thing_works_alone(group: WorldProcessGroup) -> None:
    group.attach(MPI.COMM_SELF)
    tensor, parts = numbers(3), [torch.empty(3)]
    group.allreduce([tensor])
    group.allgather([parts], [tensor])
    group.broadcast([tensor])
    assert group.failure is None
    assert torch.equal(parts[0], numbers(3))
    assert (group.rank(), group.size()) == (0, 1)
