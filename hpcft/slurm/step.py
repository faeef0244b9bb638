"""The job step this process is a task of, as Slurm's environment has it."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One task's view of its step.

    job, step: their numbers.
    task, tasks: this task's number and how many there are.
    node: index of this task's node in the step.
    tasks_here: tasks on this node.
    host: the node's name.
    launcher: address of srun, as the nodes reach it.
    pmix: whether srun was given ``--mpi=pmix``.
    """

    job: str
    step: str
    task: int
    tasks: int
    node: int
    tasks_here: int
    host: str
    launcher: str
    pmix: bool


def find_step(environ: Mapping[str, str]) -> Step | None:
    """The step, or None outside of one."""
    # A batch script has a step number in some versions, but no srun that started it.
    if "SLURM_STEP_ID" not in environ or "SLURM_SRUN_COMM_HOST" not in environ:
        return None
    node = int(environ["SLURM_NODEID"])
    return Step(
        job=environ["SLURM_JOB_ID"],
        step=environ["SLURM_STEP_ID"],
        task=int(environ["SLURM_PROCID"]),
        tasks=int(environ["SLURM_STEP_NUM_TASKS"]),
        node=node,
        tasks_here=tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[node],
        host=environ["SLURMD_NODENAME"],
        launcher=environ["SLURM_SRUN_COMM_HOST"],
        pmix="PMIX_RANK" in environ,
    )


def cancel(step: Step) -> None:
    """Ask all tasks of the step to end, as well as can be: without scancel they have to notice."""
    with contextlib.suppress(OSError):
        subprocess.run(
            ["scancel", "--signal=TERM", f"{step.job}.{step.step}"],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's compressed list, such as ``2(x3),1``: tasks of each node in order.

    >>> tasks_per_node("2(x3),1")
    [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise ValueError(f"not a list of tasks per node: {text!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts
