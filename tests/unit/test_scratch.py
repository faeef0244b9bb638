"""Directories that are gone when their maker is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpcft.launch.scratch import scratch

_HOLD = """
import sys, time
from pathlib import Path
from hpcft.launch.scratch import scratch

with scratch(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


def test_it_is_there_and_then_gone(tmp_path: Path) -> None:
    with scratch(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("content")
        assert list(tmp_path.iterdir()) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_the_next_removes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with scratch(tmp_path) as ours:
            # As long as it lives, it is left alone.
            assert {theirs, ours} == set(tmp_path.iterdir())
        process.send_signal(signal.SIGKILL)
    assert theirs.exists()
    with scratch(tmp_path) as ours:
        assert list(tmp_path.iterdir()) == [ours]


def test_many_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    def hold(_: int) -> bool:
        with scratch(tmp_path) as folder:
            (folder / "file").write_text("content")
            return all((folder / "file").exists() for _ in range(20))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(hold, range(200)))
    assert list(tmp_path.iterdir()) == []


def test_memory_is_preferred() -> None:
    with scratch() as folder:
        assert folder.parent == Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp")
