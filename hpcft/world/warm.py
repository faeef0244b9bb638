"""The warm process: Python with all that a rank imports, to fork ranks from, and bystanders.

A rank that is started again pays for neither an interpreter nor torch, and all ranks that come
from one warm process share its memory. When training has begun, a rank says which libraries its
script has imported besides, and the warm process imports them as well. It has started neither MPI
nor threads nor a device, which would not survive a fork; a library that starts some ends it. What
the user has it import is left to a process of its own (:mod:`hpcft.world.preload`).

Whose rank it forks need not be its parent: one warm process may serve all shepherds of a machine,
and does not end with any of them. The kernel tells of a death, and of a stop, to the parent alone.
So between the two there is a **minder**, the rank's parent, which does nothing but wait for it and
pass on what ``waitpid`` says to the rank's shepherd. And the kernel kills the rank when its minder
ends, and when its shepherd does: the shepherd alone can write to a pipe of which the rank has the
other end, and asks to be sent SIGKILL when something happens to it (fcntl(2), F_SETSIG).
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hpcft.world import script
from hpcft.world.link import CONTROL_FD, LINK_FD, PRELOAD, PROGRESS_FD
from hpcft.world.parent import die_with_parent
from hpcft.world.preload import lasting_threads, stand_in

#: What a rank imports whatever its script is; the last when it makes its first optimizer.
_MODULES = ("mpi4py.MPI", "hpcft.train.api", "torch._dynamo")
#: Signals that end a process; others are sent to all processes of a job by Slurm.
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: What the process that this one was forked from had imported.
_there: frozenset[str] = frozenset()


def serve(target: Sequence[str]) -> None:
    """Import, then fork a rank whenever the shepherd asks; returns in each rank, and never else.

    In the rank the environment is the one that the shepherd has sent, with what the modules
    imported here have changed in theirs.

    Parameters
    ----------
    target: the script and its arguments.
    """
    control = socket.socket(fileno=int(os.environ.pop(CONTROL_FD)))
    control.set_inheritable(False)
    preload = json.loads(os.environ.pop(PRELOAD))
    with contextlib.suppress(Exception):
        settings = importlib.import_module("mpi4py").rc
        # MPI is a rank's to start, and ranks leave by os._exit: MPI_Finalize would wait for the
        # dead.
        settings.initialize = settings.finalize = False
    _import(_MODULES)
    script.prepare(target)
    before = dict(os.environ)
    if preload and stand_in(preload):
        _settle()
    threads = lasting_threads()
    while True:
        wish, fds = _next(control)
        if "modules" in wish:
            _import(wish["modules"])
            if lasting_threads() > threads:
                os._exit(0)
        elif "environ" not in wish:
            # It is enough that what was asked before is done.
            pass
        elif _fork(control, fds):
            changed = {
                name: value for name, value in os.environ.items() if before.get(name) != value
            }
            os.environ.clear()
            os.environ.update({**wish["environ"], **changed})
            os.environ[LINK_FD], os.environ[PROGRESS_FD] = map(str, fds[1:3])
            return
        for fd in fds:
            os.close(fd)


def _next(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a shepherd wants next, and the descriptors that come with it."""
    # Minders that end while this waits are nobody's concern.
    former = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    asked, fds, _, _ = socket.recv_fds(control, 1, 7)
    signal.signal(signal.SIGCHLD, former or signal.SIG_DFL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    if not asked:
        os._exit(0)
    wish, *rest = fds
    with os.fdopen(wish, "rb") as file:
        file.seek(0)
        return json.load(file), rest


def libraries() -> list[str]:
    """The modules that this rank has imported since it was forked and that are not the script's."""
    homes = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
    return [
        name
        for name, module in list(sys.modules.items())
        if name not in _there
        and (spec := getattr(module, "__spec__", None))
        and (spec.origin or "").startswith(homes)
    ]


def _import(modules: Sequence[str]) -> None:
    missing = [module for module in modules if module not in sys.modules]
    for module in missing:
        # What is wrong is found, and told, by a rank.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    if missing:
        _settle()


def _settle() -> None:
    global _there
    _there = frozenset(sys.modules)
    # What is there now is never looked through again, and so stays shared.
    gc.collect()
    gc.freeze()


def _fork(control: socket.socket, fds: Sequence[int]) -> bool:
    """Whether this is the rank.

    Parameters
    ----------
    control: to be closed in what is forked.
    fds: connection to who has asked; the rank's link and page; where its output goes, and its
        errors; and the end of the pipe that its shepherd alone can write to.
    """
    try:
        if os.fork():
            return False
    except OSError:
        # Whoever asks notices, and may ask again.
        return False
    control.close()
    asker, link, page, output, errors, switch = fds
    # Away from the group that is killed when what has preloaded modules ends.
    os.setsid()
    minder = os.getpid()
    rank = os.fork()
    if rank:
        for fd in (link, page, output, errors, switch):
            os.close(fd)
        _mind(rank, socket.socket(fileno=asker))
    os.setsid()
    die_with_parent(signal.SIGKILL)
    if os.getppid() != minder:
        os._exit(1)
    _die_with_writer(switch)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    for fd in (output, errors, switch):
        os.close(fd)
    if not _wanted(asker):
        os._exit(1)
    return True


def _wanted(asker: int) -> bool:
    """Whether the shepherd, which knows of the rank now, still wants one."""
    with socket.socket(fileno=asker) as connection, contextlib.suppress(OSError):
        return bool(connection.recv(1))
    return False


def _mind(rank: int, shepherd: socket.socket) -> NoReturn:
    """Tell the shepherd which process its rank is, and then what becomes of it, until it ends."""
    # Ranks and shepherds act on them.
    for number in (*_ENDS, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("hpcft-minder")
    news, over = rank, False
    while True:
        # A shepherd that has ended hears nothing.
        with contextlib.suppress(OSError):
            shepherd.sendall(news.to_bytes(8, "big"))
        if over:
            os._exit(0)
        _, news = os.waitpid(rank, os.WUNTRACED | os.WCONTINUED)
        over = not (os.WIFSTOPPED(news) or os.WIFCONTINUED(news))


def _die_with_writer(pipe: int) -> None:
    """Have the kernel kill this process when nobody is left who could write to ``pipe``."""
    # Opened anew, for whom the kernel tells is a matter of the opening, and others have this one.
    own = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_RDONLY | os.O_ASYNC)
    gone = select.poll()
    gone.register(own, 0)
    if gone.poll(0):
        os._exit(1)
