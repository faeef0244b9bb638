"""What mpiexec takes for its remote shell in a relaunch across several Slurm jobs.

``agent.py NAME HOST COMMAND...``: the shepherd that has started mpiexec listens at the abstract
Unix socket NAME. It lets a shepherd on that host start the command (:mod:`hpcft.launch.daemons`).

Run by its path and without site packages, so that it is there in some milliseconds.
"""

from __future__ import annotations

import json
import socket
import sys


def main() -> int:
    """Pass the command on.

    Returns
    -------
    The exit code: 0 if somebody is to start it.
    """
    name, host, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as shepherd:
        try:
            shepherd.connect("\0" + name)
            # As ssh would, for the remote shell to take apart.
            command = " ".join(words)
            shepherd.sendall(json.dumps({"host": host, "command": command}).encode() + b"\n")
            return 0 if shepherd.recv(1) else 1
        except OSError as error:
            print(f"hpcft: no shepherd starts a daemon on {host}: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
