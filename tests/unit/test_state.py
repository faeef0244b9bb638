"""A training state, taken apart on one rank and installed on another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from hpcft.errors import HpcftError
from hpcft.train.state import Contents, Savepoint, Slot, State, dump, load

Optimizer = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def build(seed: int, make: Optimizer = adam) -> State:
    """As each rank builds it for itself, starting from other numbers."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    return State(
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        best=float(seed),
        history=[{"loss": seed, "weights": torch.full((2,), float(seed))}, None],
    )


def train(state: State, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        state.optimizer.step()
        state.scheduler.step()
        state.best = state.best / 2
        state.step += 1


def sent(contents: Contents) -> tuple[Any, list[torch.Tensor]]:
    """The contents as they come out of a network."""
    return load(dump(contents.skeleton)), [t.detach().clone() for t in contents.tensors]


def everything(state: State) -> Any:
    """All of a state, tensors as lists, so that it can be compared."""
    tree = {
        "step": state.step,
        "values": state.values,
        "parts": {name: part.state_dict() for name, part in state.parts.items()},
    }
    return pytree.tree_map(
        lambda leaf: (
            (leaf.dtype, leaf.detach().clone().tolist()) if torch.is_tensor(leaf) else leaf
        ),
        tree,
    )


@pytest.mark.parametrize(
    ("own_steps", "make"),
    [
        (0, adam),
        (2, adam),
        (5, adam),
        (0, momentum),
        (2, momentum),
        (5, momentum),
        (2, plain),
    ],
)
def test_a_state_received_is_the_senders_and_goes_on_as_it_would(
    own_steps: int, make: Optimizer
) -> None:
    sender, receiver = build(1, make), build(2, make)
    train(sender, 5)
    train(receiver, own_steps, seed=3)
    assert sender.digest() != receiver.digest()
    receiver.install(*sent(sender.take_apart()))
    assert everything(receiver) == everything(sender)
    assert receiver.digest() == sender.digest()
    train(sender, 3, seed=4)
    train(receiver, 3, seed=4)
    assert everything(receiver) == everything(sender)


@pytest.mark.parametrize("make", [adam, momentum, plain])
def test_a_state_received_in_place_stays_in_place(make: Optimizer) -> None:
    sender, receiver = build(1, make), build(2, make)
    train(sender, 5)
    train(receiver, 2, seed=3)
    skeleton, arriving = sent(sender.take_apart())
    live = receiver.take_apart().tensors
    assert [Slot.of(t) for t in live] == [Slot.of(t) for t in arriving]
    with torch.no_grad():
        for mine, theirs in zip(live, arriving, strict=True):
            mine.copy_(theirs)
    before = [t.data_ptr() for t in receiver.take_apart().tensors]
    receiver.install(skeleton, live)
    assert [t.data_ptr() for t in receiver.take_apart().tensors] == before
    assert everything(receiver) == everything(sender)
    train(sender, 3, seed=4)
    train(receiver, 3, seed=4)
    assert everything(receiver) == everything(sender)


def test_what_is_taken_apart_is_all_slots_and_aliases_the_live_tensors() -> None:
    state = build(1)
    train(state, 1)
    contents = state.take_apart()
    slots = [x for x in pytree.tree_leaves(contents.skeleton) if isinstance(x, Slot)]
    assert slots == [Slot.of(tensor) for tensor in contents.tensors]
    assert not any(torch.is_tensor(x) for x in pytree.tree_leaves(contents.skeleton))
    taken = {tensor.data_ptr() for tensor in contents.tensors}
    assert {parameter.data_ptr() for parameter in state.model.parameters()} <= taken
    assert state.values["history"][0]["weights"].data_ptr() in taken
    # Taking it apart changes nothing of it.
    assert everything(state)["step"] == 1
    assert torch.is_tensor(state.history[0]["weights"])


def test_values_the_sender_does_not_have_are_gone_afterwards() -> None:
    sender, receiver = build(1), build(2)
    sender.epoch = 3
    receiver.extra = "mine"
    receiver.install(*sent(sender.take_apart()))
    assert receiver.epoch == 3
    with pytest.raises(AttributeError, match="extra"):
        _ = receiver.extra


# -- the digest --------------------------------------------------------------------------------


def test_the_digest_is_of_every_tensor_of_the_modules_and_of_nothing_else() -> None:
    one, two = build(1), build(1)
    two.best, two.step = 17.0, 5
    two.optimizer.param_groups[0]["lr"] = 9.0
    assert one.digest() == two.digest()
    seen = {one.digest()}
    for tensor in two.model.state_dict().values():
        with torch.no_grad():
            tensor.reshape(-1)[-1] += 1
        seen.add(two.digest())
    assert len(seen) == 1 + len(two.model.state_dict())


def test_the_digest_tells_names_types_and_shapes_apart() -> None:
    def digest(name: str, tensor: torch.Tensor) -> str:
        module = torch.nn.Module()
        module.register_buffer(name, tensor)
        return State(model=module).digest()

    zeros = torch.zeros(4)
    digests = {
        digest("a", zeros),
        digest("b", zeros),
        digest("a", zeros.view(torch.int32)),
        digest("a", zeros.reshape(2, 2)),
    }
    assert len(digests) == 4
    spread = torch.arange(8.0).reshape(4, 2)[:, 0]
    assert digest("a", spread) == digest("a", spread.contiguous())
    digest("a", torch.tensor(1.0, dtype=torch.bfloat16))


def test_a_submodule_called_module_is_not_all_of_its_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Linear(2, 2)
            self.head = torch.nn.Linear(2, 1)

    state = State(model=Model())
    before = state.digest()
    with torch.no_grad():
        state.model.head.weight += 1
    assert state.digest() != before


# -- the savepoint -----------------------------------------------------------------------------


def forward(state: State, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    state.model(torch.randn(5, 3, generator=generator)).sum().backward()


def test_a_step_broken_off_leaves_no_trace_in_buffers_values_and_gradients() -> None:
    state = build(1)
    train(state, 2)
    state.optimizer.zero_grad()
    before = everything(state)
    savepoint = Savepoint(state)
    places = [buffer.data_ptr() for buffer in state.buffers()]
    for seed in range(2):
        forward(state, seed)
        state.best = -1.0
        state.seen = "half a batch"
        assert everything(state) != before
        savepoint.restore()
        assert everything(state) == before
        assert all(parameter.grad is None for parameter in state.model.parameters())
        assert [buffer.data_ptr() for buffer in state.buffers()] == places
        assert "seen" not in state.values


def test_a_savepoint_renewed_brings_back_what_was_then() -> None:
    state = build(1)
    savepoint = Savepoint(state)
    train(state, 2)
    state.optimizer.zero_grad()
    savepoint.renew()
    before = everything(state)
    forward(state, 7)
    state.best = -1.0
    savepoint.restore()
    assert everything(state) == before


# -- what scripts do with it -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["commit", "digest", "install", "modules", "buffers", "parts", "values", "step"]
)
@pytest.mark.parametrize("value", [1.0, torch.nn.Linear(1, 1)], ids=["value", "part"])
def test_a_part_named_like_something_of_the_state_is_refused(name: str, value: Any) -> None:
    with pytest.raises(HpcftError) as caught:
        State(**{name: value})
    assert repr(name) in caught.value.message
    assert caught.value.remedy


def test_a_value_set_later_under_such_a_name_is_refused_too() -> None:
    state = State(best=0.0)
    with pytest.raises((HpcftError, AttributeError)):
        state.digest = "abc"


def test_values_can_be_set_and_parts_cannot() -> None:
    state = build(1)
    state.best = 2.5
    state.epoch = 4
    assert (state.best, state.epoch) == (2.5, 4)
    assert state.values["epoch"] == 4
    with pytest.raises(AttributeError, match="model"):
        state.model = torch.nn.Linear(1, 1)
    with pytest.raises(AttributeError, match="nothing"):
        _ = state.nothing


def test_parts_are_told_from_values_by_what_they_can_do() -> None:
    state = build(1)
    assert list(state.parts) == ["model", "optimizer", "scheduler"]
    assert list(state.values) == ["best", "history"]
    assert list(state.modules()) == [state.model]
    assert list(state.optimizers()) == [state.optimizer]
    assert not state.sharded()


def test_to_commit_outside_of_a_run_is_an_error_with_a_remedy() -> None:
    with pytest.raises(HpcftError) as caught:
        build(1).commit(loss=1.0)
    assert "job.run()" in caught.value.message
    assert caught.value.remedy
