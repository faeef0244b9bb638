"""Running those of Slurm's commands that only print something."""

from __future__ import annotations

import subprocess

_SECONDS = 20.0  # programs on a network file system, and a busy controller, answer late


def printed(*command: str, complaints: bool = False) -> str:
    """What a command prints; empty if it cannot be had.

    Parameters
    ----------
    complaints: whether what it prints when it fails counts, too.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            # Some versions of srun list there.
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if complaints or done.returncode == 0 else ""
