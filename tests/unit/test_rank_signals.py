"""Signals that ranks leave to their shepherds, and what they start does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

PROGRAM = """
import multiprocessing, os, psutil, signal
from hpcft.world.signals import leave_to_the_shepherd

def wait(there, never):
    there.set()
    never.acquire()

leave_to_the_shepherd()
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    os.kill(os.getpid(), number)
context = multiprocessing.get_context("fork")
there, never = context.Event(), context.Lock()
never.acquire()
worker = context.Process(target=wait, args=(there, never))
worker.start()
there.wait()
while psutil.Process(worker.pid).status() != psutil.STATUS_SLEEPING:
    pass
worker.terminate()
worker.join(20)
code = worker.exitcode
worker.kill()
print(code)
"""


def test_a_worker_that_waits_can_be_terminated() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert (done.stdout, done.returncode) == (f"{-signal.SIGTERM}\n", os.EX_OK)
