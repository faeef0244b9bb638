"""When checkpoints are saved as training goes on, and that a failed one is not the last."""

from __future__ import annotations

import contextlib
import os
import shutil

import torch
from disks import Disk
from training import wait_for

import hpcft
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Store
from hpcft.train.series import Hooks, Series


def test_a_save_that_fails_when_the_next_is_due_is_not_the_last(disk: Disk) -> None:
    saver = Saver(Store(disk.path / "checkpoints").create(), Alone(), Engine(16 << 20))
    failed: list[int] = []
    hooks = Hooks(
        committed=lambda checkpoint, seconds: None,
        written=lambda save: None,
        failed=lambda step, error: failed.append(step),
        skipped=lambda step, why: None,
        waiting=contextlib.nullcontext,
    )
    # So short a time that one is due at every step, once a step's time is known.
    series = Series(saver, every=1e-9, timed=True, overlap=False, hooks=hooks)
    state = hpcft.State(model=torch.nn.Linear(1000, 1000))
    series.attach(Alone(), 0, soon=False)
    free = shutil.disk_usage(disk.path).free
    filler = os.open(disk.path / "filler", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(filler, 0, free - (1 << 20))

    def step() -> bool:
        state.__dict__["step"] += 1
        series.edge(state, {})
        return bool(failed)

    wait_for("a save to fail, as the disk is full", step)
    os.ftruncate(filler, 0)
    os.close(filler)
    wait_for("a checkpoint", lambda: step() and series.step > failed[0])
