"""What a rank runs first: start MPI, meet the others, then run the user's script.

A bystander (:mod:`hpcft.world.bystander`) runs the script, or something else, alone.

``python -m hpcft.world.rank [-m] SCRIPT ARGS...``, started by the rank's shepherd or the launcher,
is the warm process that the rank itself is forked from.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import signal
import sys
import traceback
from typing import NoReturn

from hpcft.errors import HpcftError
from hpcft.world import bystander, garbage, script, warm
from hpcft.world.link import CONTROL_FD, STACKS_SIGNAL, STARTED_BY, Link
from hpcft.world.parent import die_with_parent
from hpcft.world.signals import leave_to_the_shepherd
from hpcft.world.start import start_mpi


def leave(code: int) -> NoReturn:
    """End this process without MPI_Finalize, but with everything else an end brings."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Entry of the warm process, and of the rank."""
    if CONTROL_FD not in os.environ:
        sys.exit("hpcft.world.rank is no command; use python -m hpcft.run")
    leave_to_the_shepherd()
    die_with_parent(signal.SIGKILL)
    if os.getppid() != int(os.environ.pop(STARTED_BY)):
        sys.exit("hpcft.world.rank has lost what has started it")
    # Until training begins, or for good if the script is not one of ours.
    garbage.seldom()
    target = sys.argv[1:]
    warm.serve(target)
    _rank(target)


def _rank(target: list[str]) -> None:
    # Again, for it is another process.
    leave_to_the_shepherd()
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    link = Link.inherited()
    assert link is not None
    link.progress.live()
    code = 0
    try:
        options = json.loads(os.environ["HPCFT_RUN"])
        if "bystander" in options:
            bystander.stand(link, options)
            # Some have something to do that is not the script's.
            target = options["bystander"]["runs"] or target
        else:
            start_mpi()
            # Not above, for it imports MPI, which starts it.
            from hpcft.world.session import meet

            meet(link)
        script.run(target)
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
