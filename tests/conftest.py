"""What tests of whole runs share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from training import STORIES, Training

# Else every process of every run compiles hpcft anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell's job in the background ignores it, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How fast something is, on a machine that may do other things as well, is no test's business.
settings.register_profile("hpcft", deadline=None)
settings.load_profile("hpcft")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test is reported with what its runs have said."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if call.when == "call" and report.failed:
        report.sections += [("run", story()) for story in STORIES]
    if call.when == "teardown":
        STORIES.clear()


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of tests are not among those of the user, nor of other tests."""
    home = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    return home


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
