"""What a rank runs first: start MPI, meet the others, then run the user's script.

``python -m hpcft.world.rank [-m] SCRIPT ARGS...``, started by the rank's shepherd.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from hpcft.errors import HpcftError
from hpcft.world.link import STACKS_SIGNAL, Link
from hpcft.world.start import start_mpi

_PR_SET_PDEATHSIG = 1


def leave(code: int) -> NoReturn:
    """End this process without MPI_Finalize, but with everything else an end brings."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_target(arguments: list[str]) -> None:
    module = arguments[0] == "-m"
    target, *rest = arguments[1:] if module else arguments
    sys.argv = [target, *rest]
    if module:
        sys.path[0] = os.getcwd()
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")


def main() -> None:
    """Entry of the rank's process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    link = Link.inherited()
    if link is None:
        sys.exit("hpcft.world.rank is started by a shepherd; use python -m hpcft.run")
    link.progress.live()
    code = 0
    try:
        start_mpi()
        # Not above, for it imports MPI, which starts it.
        from hpcft.world.session import meet

        meet(link)
        _run_target(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        if code:
            # So that this is not taken for a violent end.
            link.send("said", text="")
    except HpcftError as error:
        code = error.exit_code
        link.send("abort", code=code, reason=error.line)
        # The shepherds end all ranks now; whoever prints would print once a rank.
        signal.pause()
    except BaseException as error:
        code = 1
        traceback.print_exc()
        link.send("said", text=f"{type(error).__name__}: {error}")
    leave(code)


if __name__ == "__main__":
    main()
