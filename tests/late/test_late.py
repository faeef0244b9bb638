"""Streams and events, tried on a device that is late.

It has to be compiled first, which needs ninja, and minutes: `make test-late`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training import PROGRAM, Training

from hpcft.ckpt.store import Store

HERE = Path(__file__).parent


@pytest.mark.parametrize("without", ["", "follow", "lead", "follow_all", "mark"])
def test_no_wait_can_be_left_out(tmp_path: Path, without: str) -> None:
    command = [sys.executable, str(HERE / "streams.py"), str(tmp_path), *without.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == int(bool(without)), done.stdout + done.stderr


@pytest.mark.mpi
def test_a_training_that_is_disturbed_and_restored(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    def digest(name: str, options: list[str], *more: str) -> str:
        program = [str(HERE / "late.py"), str(PROGRAM), "--device=late", "--width=5000"]
        run = Training(
            tmp_path / name,
            ["--nproc", "2", *options],
            [*program, "--steps=20", "--pace=0", *more],
            environ={**os.environ, "LATE_MS": "1"},
        )
        try:
            return str(run.start().finish()["params_sha256"])
        finally:
            run.stop()

    saving = ["--ckpt-dir", str(folder), "--ckpt-every", "1000", "--ckpt-memory", "16M"]
    harm = ["--save-at=7", "--save-overlap", "--suicide=12:1"]
    undisturbed = digest("undisturbed", [])
    assert digest("disturbed", ["--spares", "1", *saving], *harm) == undisturbed
    saved = Store(folder).committed()
    assert [checkpoint.step for checkpoint in saved] == [7, 20]
    Store(folder).discard(saved[-1])
    assert digest("restored", saving) == undisturbed
