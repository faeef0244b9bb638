"""The warm process: Python with all that a rank imports, to fork ranks from, and bystanders.

A rank that is started again pays for neither an interpreter nor torch, and all ranks that come
from one warm process share its memory. When training has begun, a rank says which libraries its
script has imported besides, and the warm process imports them as well. It has started neither MPI
nor threads nor a device, which would not survive a fork; a library that starts some ends it. What
the user has it import is left to a process of its own (:mod:`hpcft.world.preload`).

The rank is forked twice, so that it becomes the child of the shepherd, which has said that it
adopts orphans (PR_SET_CHILD_SUBREAPER): whose death the kernel tells of is the parent.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Sequence
from typing import Any

from hpcft.world import script
from hpcft.world.link import CONTROL_FD, LINK_FD, PROGRESS_FD
from hpcft.world.parent import die_with_parent
from hpcft.world.preload import lasting_threads, stand_in

#: What a rank imports whatever its script is; the last when it makes its first optimizer.
_MODULES = ("mpi4py.MPI", "hpcft.train.api", "torch._dynamo")
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
    with contextlib.suppress(Exception):
        settings = importlib.import_module("mpi4py").rc
        # MPI is a rank's to start, and ranks leave by os._exit: MPI_Finalize would wait for the
        # dead.
        settings.initialize = settings.finalize = False
    _import(_MODULES)
    script.prepare(target)
    threads = lasting_threads()
    before = dict(os.environ)
    while True:
        wanted, fds = _next(control)
        if "ready" in wanted:
            control.sendall(bytes(8))
            continue
        if "preload" in wanted:
            if stand_in(wanted["preload"]):
                _settle()
                threads = lasting_threads()
            continue
        if "modules" in wanted:
            _import(wanted["modules"])
            if lasting_threads() > threads:
                os._exit(0)
            continue
        if _fork(control, wanted["parent"]):
            control.close()
            changed = {
                name: value for name, value in os.environ.items() if before.get(name) != value
            }
            os.environ.clear()
            os.environ.update({**wanted["environ"], **changed})
            os.environ[LINK_FD], os.environ[PROGRESS_FD] = map(str, fds)
            return
        for fd in fds:
            os.close(fd)


def _next(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What the shepherd wants next, and the descriptors that come with it."""
    asked, fds, _, _ = socket.recv_fds(control, 1, 3)
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
    for module in modules:
        # What is wrong is found, and told, by a rank.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    _settle()


def _settle() -> None:
    global _there
    _there = frozenset(sys.modules)
    # What is there now is never looked through again, and so stays shared.
    gc.collect()
    gc.freeze()


def _fork(control: socket.socket, shepherd: int) -> bool:
    """Whether this is the rank."""
    between = os.fork()
    if between:
        os.waitpid(between, 0)
        return False
    rank = os.fork()
    if rank:
        control.sendall(rank.to_bytes(8, "big"))
        os._exit(0)
    os.setsid()
    while os.getppid() != shepherd:
        if os.getppid() == 1:
            os._exit(1)
        time.sleep(0.0005)
    die_with_parent(signal.SIGKILL)
    if os.getppid() != shepherd:
        os._exit(1)
    return True
