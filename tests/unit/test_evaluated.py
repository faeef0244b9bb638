"""What a checkpoint was found to be worth, and who finds that out."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpcft.ckpt import evaluated
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.policy import Best, Retention
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load_some
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Checkpoint, Store


def save(store: Store, step: int, loss: float) -> Checkpoint:
    """A checkpoint with a model and something much larger besides."""
    tree = {
        "model": {"weight": torch.full((50, 50), float(step))},
        "optimizer": {"state": {0: {"exp_avg": torch.arange(100_000.0)}}},
        "values": {"best": loss},
    }
    saver = Saver(store, Alone(), Engine(16 << 20))
    made = saver.begin(step, tree, {"loss": loss})
    made.wait_copied()
    while not made.advance(waiting=True):
        pass
    made.finish()
    return store.committed()[-1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "saved").create()


def settle(checkpoint: Checkpoint, **found: float) -> None:
    with evaluated.claimed(checkpoint.path, checkpoint.step) as claim:
        assert claim
        claim.settle(found)


def test_it_is_told_with_the_metrics_of_the_step(store: Store) -> None:
    checkpoint = save(store, 10, 0.5)
    settle(checkpoint, accuracy=0.25, broken=float("nan"))
    assert checkpoint.metrics == {"loss": 0.5, "validation/accuracy": 0.25}


def test_what_is_evaluated_is_not_again(store: Store) -> None:
    checkpoint = save(store, 10, 0.5)
    settle(checkpoint, accuracy=0.25)
    with evaluated.claimed(checkpoint.path, checkpoint.step) as claim:
        assert claim is None


def _hold(folder: Path, tell: Connection) -> None:
    with evaluated.claimed(folder, 10) as claim:
        tell.send(claim is not None)
        signal.pause()


def test_one_at_a_time_evaluates_and_who_is_killed_leaves_it_to_others(store: Store) -> None:
    checkpoint = save(store, 10, 0.5)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    other = context.Process(target=_hold, args=(checkpoint.path, theirs))
    other.start()
    assert ours.recv()
    with evaluated.claimed(checkpoint.path, checkpoint.step) as claim:
        assert claim is None
    assert checkpoint.metrics == {"loss": 0.5}
    assert other.pid
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    settle(checkpoint, accuracy=1.0)
    assert checkpoint.metrics["validation/accuracy"] == 1.0


def test_of_a_checkpoint_that_is_gone_that_is_said(store: Store) -> None:
    with (
        pytest.raises(FileNotFoundError),
        evaluated.claimed(store.path / "step-000000000010", 10),
    ):
        pass


def test_the_best_by_it_are_kept(store: Store) -> None:
    for step, accuracy in ((10, 0.9), (20, 0.5), (30, 0.7)):
        settle(save(store, step, 1.0), accuracy=accuracy)
    retention = Retention(1, best=Best.parse("validation/accuracy:max"))
    assert [one.step for one in retention.surplus(store.committed())] == [20]


def test_a_folder_that_is_used_again_has_lost_it(store: Store) -> None:
    checkpoint = save(store, 10, 0.5)
    settle(checkpoint, accuracy=0.25)
    store.discard(checkpoint)
    again = save(store, 20, 0.4)
    assert again.metrics == {"loss": 0.4}
    assert not (again.path / evaluated.NAME).exists()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["step", "metrics", "x"]), inner, max_size=3)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_the_file_holds_it_is_read_or_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / evaluated.NAME).write_bytes(content)
    for value in evaluated.metrics(tmp_path, 10).values():
        assert isinstance(value, float)


def test_of_a_checkpoint_some_parts_are_read(store: Store) -> None:
    checkpoint = save(store, 10, 0.5)
    step, tree = load_some(
        checkpoint.state,
        Engine(16 << 20),
        lambda part: part != "optimizer",
        lambda keys, spec: None,
    )
    assert step == 10
    assert torch.equal(tree["model"]["weight"], torch.full((50, 50), 10.0))
    assert tree["values"] == {"best": 0.5}
    assert tree["optimizer"]["state"][0]["exp_avg"] is None


@pytest.mark.parametrize(("damaged", "wanted"), [("weight", True), ("exp_avg", False)])
def test_only_damage_in_what_is_read_matters(store: Store, damaged: str, wanted: bool) -> None:
    checkpoint = save(store, 10, 0.5)
    sought = torch.full((50, 50), 10.0) if wanted else torch.arange(100_000.0)
    content = checkpoint.state.read_bytes()
    at = content.index(sought.numpy().tobytes())
    with checkpoint.state.open("r+b") as file:
        file.seek(at + 4)
        file.write(b"bad")
    arguments = (checkpoint.state, Engine(16 << 20), lambda part: part == "model")
    if wanted:
        with pytest.raises(Damaged, match=damaged):
            load_some(*arguments, lambda keys, spec: None)
    else:
        assert load_some(*arguments, lambda keys, spec: None)[0] == 10
