"""hpcft doctor on this machine, with a rank really killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi


def doctor(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hpcft.cli.main", "doctor", *options],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_machine_that_will_do(tmp_path: Path) -> None:
    done = doctor("--json", "--run-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["subject"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found["Open MPI"]["level"] == "ok"
    assert found["killed rank"]["level"] == "ok", found["killed rank"]
    assert "2 of 3 ranks went on" in found["killed rank"]["text"]


def test_a_setting_that_takes_fault_tolerance_away(tmp_path: Path) -> None:
    done = doctor("--run-dir", str(tmp_path), OMPI_MCA_pml="ucx")
    assert done.returncode == 1, done.stdout
    assert "fail  messaging:" in done.stdout
    assert "fail  killed rank:" in done.stdout
