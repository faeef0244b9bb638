"""Jobs and steps as Slurm's queue has them: which of them run, and how to end them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

_SECONDS = 10.0  # a busy controller answers late; nobody is to wait for it for long


def states(jobs: Iterable[str]) -> dict[str, str] | None:
    """The states of those of the jobs that have not ended, such as ``RUNNING`` or ``PENDING``.

    Returns
    -------
    By the job's number; None if Slurm does not say.
    """
    lines = _squeue("--jobs", ",".join(sorted(set(jobs))), "--format=%A %T")
    return None if lines is None else dict(line.split() for line in lines)


def step_runs(job: str, step: str) -> bool | None:
    """Whether a step runs; None if Slurm does not say."""
    lines = _squeue("--steps", "--jobs", job, "--format=%i")
    return None if lines is None else any(line.endswith(f".{step}") for line in lines)


def nodes(job: str) -> list[str]:
    """The nodes a job runs on; none if Slurm does not say."""
    lines = _squeue("--jobs", job, "--format=%N") or [""]
    return expand(lines[0])


def expand(hosts: str) -> list[str]:
    """Slurm's compressed list of nodes, such as ``n[1-3]``, as their names."""
    done = _call("scontrol", "show", "hostnames", hosts) if hosts else ""
    return [] if isinstance(done, str) else done.stdout.split()


def signal_step(job: str, step: str, name: str) -> str:
    """Send all tasks of a step a signal, named as in ``TERM``.

    Returns
    -------
    Why that could not be; empty if it was.
    """
    done = _call("scancel", f"--signal={name}", f"{job}.{step}")
    if isinstance(done, str):
        return done
    if not done.returncode or ("Invalid job id" in done.stderr and step_runs(job, step)):
        # Of a step that has ended on some of its nodes it says so of these, and signals the others.
        return ""
    return done.stderr.strip() or f"scancel: exit code {done.returncode}"


def cancel(job: str) -> None:
    """End a job, if Slurm does as it is told."""
    _call("scancel", job)


def _squeue(*options: str) -> list[str] | None:
    done = _call("squeue", "--noheader", *options)
    if isinstance(done, str):
        return None
    if done.returncode:
        # What it says of a job that ended some time ago.
        return [] if "Invalid job id" in done.stderr else None
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _call(*command: str) -> subprocess.CompletedProcess[str] | str:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
