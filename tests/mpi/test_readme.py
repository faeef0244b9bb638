"""What the README shows is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from training import HERE, Training

pytestmark = pytest.mark.mpi


def test_the_example_trains(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (HERE.parent / "README.md").read_text(), re.S)
    script = tmp_path / "train.py"
    script.write_text(code)
    run = Training(tmp_path / "run", ["--nproc", "2", "--spares", "1"], [str(script)]).start()
    # Five epochs of 4096 samples, in batches of 32 on each of 2 ranks.
    assert run.finish()["steps"] == 5 * 4096 // (2 * 32)
