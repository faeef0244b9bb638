"""Saves into a file system that stops answering: nobody waits for ever, nothing is lost.

fsfreeze(8) does it: who writes to a frozen file system waits in the kernel until it is thawed.
"""

from __future__ import annotations

import pytest
import torch
from disks import Disk
from training import wait_for

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import SaveFailed, Saver
from hpcft.ckpt.store import Store

#: Seconds.
PATIENCE = 0.5


@pytest.fixture
def saver(disk: Disk) -> Saver:
    # The pool is much smaller than the state, and the disk slow enough to be frozen in between.
    engine = Engine(2 << 20, chunk=1 << 20, bandwidth=16 << 20)
    return Saver(Store(disk.path / "checkpoints").create(), Alone(), engine, PATIENCE)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2_000_000,), value)}


def save(saver: Saver, step: int) -> None:
    saving = saver.begin(step, state(step))
    saving.wait_copied()
    while not saving.advance(waiting=True):
        pass
    saving.finish()


def good(saver: Saver) -> list[int]:
    """The steps of the committed checkpoints, all of which hold what they should."""
    steps = []
    for checkpoint in saver.store.committed():
        step, content = load(checkpoint.state, Engine(2 << 20, chunk=1 << 20))
        assert torch.equal(content["w"], state(step)["w"])
        steps.append(step)
    return steps


def test_a_save_that_cannot_begin_fails(disk: Disk, saver: Saver) -> None:
    save(saver, 1)
    disk.freeze()
    with pytest.raises(SaveFailed, match=r"no checkpoint of step 2: .* not answered for 0\.5 s"):
        saver.begin(2, state(2))
    assert saver.hangs
    disk.thaw()
    wait_for("the call to return", lambda: not saver.hangs)
    save(saver, 3)
    assert good(saver) == [1, 3]


def test_the_state_may_change_when_nothing_gets_written(disk: Disk, saver: Saver) -> None:
    save(saver, 1)
    saving = saver.begin(2, state(2))
    disk.freeze()
    saving.wait_copied()
    with pytest.raises(SaveFailed, match=r"no checkpoint of step 2: .* nothing for 0\.5 s"):
        saving.advance()
    disk.thaw()
    save(saver, 3)
    assert good(saver) == [1, 3]
    # What was left unfinished is gone: whoever hangs may yet write to it.
    assert {entry.name[:5] for entry in saver.store.path.iterdir()} == {"step-"}


def test_a_commit_that_does_not_end_fails_or_comes_late(disk: Disk, saver: Saver) -> None:
    save(saver, 1)
    saving = saver.begin(2, state(2))
    saving.wait_copied()
    assert saving._transfer is not None
    assert saving._transfer.wait(60)
    disk.freeze()
    assert saving.advance()
    assert not saving.settled
    with pytest.raises(SaveFailed, match=r"no checkpoint of step 2: .* not answered for 0\.5 s"):
        saving.finish()
    assert saver.hangs
    disk.thaw()
    wait_for("the commit to end", lambda: saving.settled)
    assert good(saver) == [1, 2]
    save(saver, 3)
    assert good(saver) == [1, 2, 3]
