"""What tests of whole runs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from training import Training


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    """Starts trainings on this machine; those still running at the test's end are ended."""
    started: list[Training] = []

    def start(*options: str, program: list[str] | None = None, **how: object) -> Training:
        training = Training(tmp_path / f"run{len(started)}", list(options), **how)  # type: ignore[arg-type]
        if program is not None:
            training.program = [training.program[0], *program]
        started.append(training.start())
        return training

    yield start
    for training in started:
        training.stop()
