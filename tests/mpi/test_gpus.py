"""Trainings on GPUs: gradients through pinned memory, checkpoints, spares. One GPU will do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training import Training

from hpcft.ckpt.store import Store

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

Launch = Callable[..., Training]
PROGRAM = ["--device", "cuda", "--width", "5000"]


def test_a_training_on_gpus_that_is_disturbed_and_restored(launch: Launch, tmp_path: Path) -> None:
    undisturbed = launch("--nproc", "2", program=PROGRAM).finish()["params_sha256"]
    folder = tmp_path / "checkpoints"
    small = ["--ckpt-dir", str(folder), "--ckpt-every", "5", "--ckpt-memory", "16M"]
    harm = ["--save-at=7", "--save-overlap", "--suicide=20:1"]
    run = launch("--nproc", "2", "--spares", "1", *small, program=[*PROGRAM, *harm])
    summary = run.finish()
    assert len(summary["failures"]) == 1
    assert summary["params_sha256"] == undisturbed
    checkpoints = Store(folder).committed()
    for late in checkpoints[1:]:
        Store(folder).discard(late)
    summary = launch("--nproc", "2", *small, program=PROGRAM).finish()
    assert summary["restored_step"] == checkpoints[0].step
    assert summary["params_sha256"] == undisturbed
