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
    restarts: how often the job was requeued.
    nodes: how many the job had when the step began.
    task, tasks: this task's number and how many there are.
    node: index of this task's node in the step.
    task_here, tasks_here: this task's number among those on its node, and how many there are.
    host: the node's name.
    hosts: the step's, as Slurm compresses a list of them.
    launcher: address of srun, as the nodes reach it.
    pmix: whether srun was given ``--mpi=pmix``.
    """

    job: str
    step: str
    restarts: int
    nodes: int
    task: int
    tasks: int
    node: int
    task_here: int
    tasks_here: int
    host: str
    hosts: str
    launcher: str
    pmix: bool

    @property
    def launch(self) -> str:
        """A name no other launch has, of this job's requeues either."""
        return f"{self.job}.{self.step}.{self.restarts}"


def find_step(environ: Mapping[str, str]) -> Step | None:
    """The step, or None outside of one."""
    # A batch script has a step number in some versions, but no srun that started it.
    if "SLURM_STEP_ID" not in environ or "SLURM_SRUN_COMM_HOST" not in environ:
        return None
    node = int(environ["SLURM_NODEID"])
    return Step(
        job=environ["SLURM_JOB_ID"],
        step=environ["SLURM_STEP_ID"],
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=int(environ.get("SLURM_JOB_NUM_NODES", "1")),
        task=int(environ["SLURM_PROCID"]),
        tasks=int(environ["SLURM_STEP_NUM_TASKS"]),
        node=node,
        task_here=int(environ["SLURM_LOCALID"]),
        tasks_here=tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[node],
        host=environ["SLURMD_NODENAME"],
        hosts=environ.get("SLURM_STEP_NODELIST", ""),
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


def overlapping(tasks: int) -> list[str]:
    """The start of a command that starts tasks in this allocation, beside the step that runs.

    ``SLURM_HOSTFILE`` is to name a file with a node a line, the first task's first.
    """
    # Those that the others have left, and that the step is to survive by itself; see place.py.
    keep = ["--kill-on-bad-exit=0", "--no-kill", "--wait=0"]
    where = ["--distribution=arbitrary", f"--ntasks={tasks}"]
    return ["srun", "--overlap", "--mpi=pmix", *keep, *where]


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
