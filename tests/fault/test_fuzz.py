"""A slice of the fuzzing of checkpoints; ``tests/fault/fuzz.py`` does as much as one likes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault


def test_a_slice_of_the_fuzzing() -> None:
    # In a process of its own, which a crash would end and whose memory is limited.
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--cases", "3000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; 0 wrong" in done.stdout
