"""Running the user's script; and running it anew, in the same process.

A model with shards is built for one rank of one number of ranks. When those change nothing of it
can be kept, and a script has to build it again. A new process would have to start Python, import
torch and start MPI first; that is saved by unwinding the script and calling it once more.

The script finds its arguments, its ``__main__``, the search path and the working directory as at
the start. Modules it has imported stay imported, and what it has changed in them, in the
environment, or by ``atexit`` stays as well.
"""

from __future__ import annotations

import contextlib
import gc
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_resets: list[Callable[[], None]] = []


class ScriptInterrupted(BaseException):
    """The script is broken off, to be run anew by all ranks.

    Not an Exception, so that ``except Exception`` in a script lets it pass.
    """


def on_interruption(reset: Callable[[], None]) -> None:
    """Have ``reset`` called, once, when the script has been unwound and before it is run anew.

    It may raise what ends the run.
    """
    _resets.append(reset)


def home(arguments: Sequence[str]) -> str:
    """The folder in which ``SCRIPT ARGS...`` or ``-m MODULE ARGS...`` finds its own modules."""
    script, *_ = arguments
    return os.getcwd() if script == "-m" else str(Path(script).resolve().parent)


def prepare(arguments: Sequence[str]) -> None:
    """Have ``sys.argv`` and the search path be as Python makes them for such a script.

    To be called once, before :func:`run`; what is imported between the two finds them so as well.
    """
    sys.argv = _argv(arguments)
    sys.path[0] = home(arguments)


def run(arguments: Sequence[str]) -> None:
    """Run ``SCRIPT ARGS...`` or ``-m MODULE ARGS...``, as Python would, until it ends by itself."""
    path, folder = list(sys.path), os.getcwd()
    while True:
        sys.argv = _argv(arguments)
        try:
            if arguments[0] == "-m":
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
            return
        except ScriptInterrupted:
            pass
        # Only now, when no traceback holds what the script had made.
        while _resets:
            _resets.pop()()
        sys.path[:] = path
        with contextlib.suppress(OSError):
            os.chdir(folder)
        # Modules and optimizers with hooks are cycles; their memory is needed for the new ones.
        gc.collect()


def _argv(arguments: Sequence[str]) -> list[str]:
    return list(arguments[1:] if arguments[0] == "-m" else arguments)
