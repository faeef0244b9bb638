"""The page a rank shares with its shepherd."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from hpcft.world.progress import Progress


def test_what_is_written_is_read() -> None:
    progress = Progress.create()
    other = Progress(os.dup(progress.fd))
    progress.run(True)
    progress.step(7)
    progress.enter()
    progress.enter()
    progress.leave()
    reading = other.read()
    assert (reading.running, reading.step, reading.waiting) == (True, 7, True)
    progress.leave()
    assert not other.read().waiting


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_end_of_a_living_process_is_noticed(how: signal.Signals | None) -> None:
    progress = Progress.create()
    alive, ready = os.pipe()
    child = os.fork()
    if child == 0:
        ours = Progress(progress.fd)
        ours.live()
        os.write(ready, b"!")
        while how:
            time.sleep(1)
        time.sleep(0.3)
        os._exit(0)
    os.read(alive, 1)
    noticed = threading.Event()

    def wait() -> None:
        progress.wait_for_end()
        noticed.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not noticed.wait(0.1)
    if how:
        os.kill(child, how)
    assert noticed.wait(10)
    os.waitpid(child, 0)


def test_nobody_is_waited_for_who_never_lived() -> None:
    Progress.create().wait_for_end()
