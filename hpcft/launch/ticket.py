"""What a relaunch starts through mpiexec or srun: a task that lends its place in MPI to a shepherd.

``ticket.py NAME NAME ...``: the shepherd that is to have this task's rank listens at the abstract
Unix socket of that number. It gets the task's environment, which is what makes a process a rank of
this launch, and lets go of the connection when it needs the place no longer.

Run by its path and without site packages, so that it is there in some milliseconds.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main() -> int:
    """Hand over the environment and wait.

    Returns
    -------
    The exit code.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        # What is sent to all of a job is for the shepherds to heed.
        signal.signal(number, signal.SIG_IGN)
    name = sys.argv[1 + int(os.environ["PMIX_RANK"])]
    with socket.socket(socket.AF_UNIX) as shepherd:
        try:
            shepherd.connect("\0" + name)
            shepherd.sendall(json.dumps(dict(os.environ)).encode() + b"\n")
            shepherd.recv(1)
        except OSError as error:
            # It has ended meanwhile, of which the others know.
            print(f"hpcft: no shepherd takes this rank: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
