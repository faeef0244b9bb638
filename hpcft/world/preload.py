"""Importing modules of the user's before ranks are forked, for ``--preload``.

What such a module does nobody knows: it may start threads, use a device, or end the process. So a
fork of the warm process imports them, and takes its place. The warm process waits, and serves
again, without the modules, when the other ends: which it does by itself if ranks that are forked
from it would not be sound.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence

from hpcft.world.parent import die_with_parent
from hpcft.world.signals import leave_to_the_shepherd

#: Seconds a thread may take to be gone after it was joined.
_JOIN_TIME = 1.0


def stand_in(modules: Sequence[str]) -> bool:
    """Fork a process that imports ``modules``.

    Returns
    -------
    True in that process, when it has; False in this one, when the other has ended.
    """
    warm = os.getpid()
    pid = os.fork()
    if pid:
        _await_end(pid, modules)
        return False
    # A group of its own, with all that the modules start.
    os.setpgid(0, 0)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != warm:
        os._exit(0)
    leave_to_the_shepherd()
    usual = lasting_threads()
    folder = os.getcwd()
    with _without_mpi():
        for module in modules:
            _import(module)
            if unfit := _unfit(usual):
                _warn(module, f"{unfit}, which a fork does not survive; nothing is preloaded")
                os._exit(0)
    os.chdir(folder)
    # Else each rank would print it once more.
    sys.stdout.flush()
    return True


def lasting_threads() -> int:
    """How many threads this process has, without those that their library ends for a fork."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return _threads()


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _await_end(pid: int, modules: Sequence[str]) -> None:
    # Its number stays its group's until it is taken in.
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        _warn(",".join(modules), f"the process that has imported it has ended ({how})")


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except BaseException as error:
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[-1]
        _warn(module, f"it raises {last}")


def _unfit(usual: int) -> str:
    """What of this process a fork would not have; empty if it would be a sound one.

    Parameters
    ----------
    usual: how many threads it had before.
    """
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        return "it has begun to use a GPU"
    deadline = time.monotonic() + _JOIN_TIME
    threads = lasting_threads()
    while threads > usual:
        if time.monotonic() > deadline:
            return (
                "it has started threads (torch starts some unless torch.set_num_threads(1) is "
                "called before; numpy and loops do without)"
            )
        time.sleep(0.01)
        threads = _threads()
    return ""


@contextlib.contextmanager
def _without_mpi() -> Iterator[None]:
    """Have calls that start MPI raise: it is each rank's to start, once it has been forked."""
    mpi = importlib.import_module("mpi4py.MPI")
    starts = {name: getattr(mpi, name) for name in ("Init", "Init_thread")}

    def refuse(*_: object) -> None:
        raise RuntimeError("MPI is started when the script is, and not while it is preloaded")

    for name in starts:
        setattr(mpi, name, refuse)
    try:
        yield
    finally:
        for name, start in starts.items():
            setattr(mpi, name, start)


def _warn(module: str, problem: str) -> None:
    sys.stdout.flush()
    print(
        f"hpcft: warning: --preload {module}: {problem}; the ranks import it themselves",
        file=sys.stderr,
        flush=True,
    )
