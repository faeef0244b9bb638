"""Trainings as jobs of submitit: submitted from a script or a notebook, with a result.

::

    executor = submitit.AutoExecutor(folder="jobs")
    executor.update_parameters(timeout_min=60, **hpcft.submitit.allocation(nodes=4))
    job = executor.submit(hpcft.submitit.Job(train, nproc=6, spares=2), lr=0.1)
    print(job.result())

submitit starts one process, on the first node of the allocation; that starts the ranks, on all of
it. On one node, and without Slurm, it does so as ``python -m hpcft.run`` does on one machine,
elsewhere with srun, as a step beside submitit's own.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from hpcft import function
from hpcft.errors import INTERRUPTED, RunFailed, UsageError, shell_code
from hpcft.launch.place import SRUN_OPTIONS
from hpcft.telemetry.rundir import RunDirectory
from hpcft.world.parent import die_with_parent

#: Variables that are about submitit's step; those about the job stay.
_OF_A_STEP = re.compile(
    "SLURM_(STEP|SRUN|NTASKS|NPROCS|TASKS|PROCID|LOCALID|NODEID|TASK_PID|GTIDS|LAUNCH|CPU_BIND"
    "|DISTRIBUTION|MPI)|PMI|OMPI_|PRTE_"
)
#: What submitit's warning may be; it is for submitit's process alone, and Slurm sends it to all.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
#: Seconds for which a run that was ended by a signal waits for submitit's own, which may be later.
_PATIENCE = 30.0
#: Lines of a rank's log that are shown where it has no traceback.
_LINES = 20


def allocation(nodes: int, ranks_per_node: int = 1) -> dict[str, Any]:
    """Parameters for ``executor.update_parameters`` that give a :class:`Job` several nodes.

    Not ``nodes=4``: submitit would start a process on each node and wait for a result of each, and
    one of a node that is lost never comes. Without Slurm they mean nothing.

    Parameters
    ----------
    nodes: how many.
    ranks_per_node: tasks that Slurm is to have room for on each.
    """
    return {
        "slurm_additional_parameters": {
            "nodes": nodes,
            "ntasks_per_node": ranks_per_node,
            "no_kill": True,
        },
        "slurm_srun_args": ["--nodes=1", "--ntasks=1", "--overlap", "--no-kill"],
    }


class Job:
    """A training as something that a submitit executor can submit.

    What it returns is the job's result: of a function, what that returns in rank 0; of a script,
    the run's summary. The arguments it is called with are those of the function, or of the script.

    When the allocation's time is nearly over submitit warns the job: the run is ended in order, and
    submitit has the job requeued, to go on from where it was. When Slurm takes the allocation away
    it sends SIGTERM to all, for which srun kills its tasks: then it goes on from the newest
    checkpoint that there is.

    Parameters
    ----------
    target: a function, called in every rank as a script would be run; or the path of a script.
    nproc, spares: ranks that train, and that wait, as of ``python -m hpcft.run``.
    options: more of its options, such as ``["--ckpt-every", "5m"]``. Run and checkpoints are in
        submitit's folder unless these say otherwise: ``<job>_run`` and ``<job>_checkpoints``.
    """

    def __init__(
        self,
        target: Callable[..., Any] | str | Path,
        *,
        nproc: int,
        spares: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        self._target = target if callable(target) else str(Path(target).absolute())
        self._nproc = nproc
        self._spares = spares
        self._options = tuple(options)
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": None, "_asked": False}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Train, in the process that submitit has started.

        Raises
        ------
        RunFailed: the run has; with the tracebacks of its ranks.
        UsageError: this is no process of submitit's.
        """
        try:
            paths = JobEnvironment().paths
        except RuntimeError as error:
            raise UsageError(
                "a hpcft.submitit.Job was called", "hand it to an executor: executor.submit(job)"
            ) from error
        folder, name = Path(paths.folder), str(paths.job_id)
        rundir = RunDirectory(self._option("--run-dir") or folder / f"{name}_run")
        target = self._prepare(rundir.path, args, kwargs)
        words = ["--nproc", str(self._nproc), "--spares", str(self._spares)]
        words += ["--run-dir", str(rundir.path)]
        if not self._option("--ckpt-dir"):
            words += ["--ckpt-dir", str(folder / f"{name}_checkpoints")]
        command = [sys.executable, "-m", "hpcft.run", *words, *self._options, *target]
        tasks = self._nproc + self._spares
        code = self._run([*starter(tasks, os.environ), *command], without_step(os.environ))
        if self._asked or code in (INTERRUPTED, 128 + signal.SIGTERM):
            # submitit's warning, which has the job requeued, may come after the one to all.
            time.sleep(_PATIENCE)
        if code:
            raise RunFailed(_story(rundir, code))
        return function.take(rundir.path) if callable(self._target) else rundir.summary()

    def checkpoint(self, *args: Any, **kwargs: Any) -> DelayedSubmission:
        """Called by submitit when the time is over: end the run in order, to be requeued."""
        # This interrupts the wait in _run, and so cannot use Popen's, which is not reentrant.
        if self._process and self._process.returncode is None:
            pid = self._process.pid
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                if not self._asked:
                    # Not SIGTERM, for which srun kills its tasks; this it passes on to them.
                    os.kill(pid, signal.SIGUSR1)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(self, *args, **kwargs)

    def _option(self, name: str) -> Path | None:
        """The value of an option among those given; the last, as in parsing."""
        found = None
        for number, word in enumerate(self._options):
            if word == name:
                found = Path(self._options[number + 1]).absolute()
            elif word.startswith(f"{name}="):
                found = Path(word.partition("=")[2]).absolute()
        return found

    def _prepare(self, folder: Path, args: Any, kwargs: Any) -> list[str]:
        """What the ranks run."""
        if callable(self._target):
            function.give(folder, self._target, args, kwargs)
            return ["-m", "hpcft.function", str(folder)]
        if kwargs:
            raise UsageError(
                "a script has no arguments by name", 'give them as words: "--lr", "0.1"'
            )
        return [self._target, *map(str, args)]

    def _run(self, command: list[str], environ: dict[str, str]) -> int:
        def asked(number: int, _: FrameType | None) -> None:
            # In Slurm the ranks are asked to end by the same signal; twice would end them at once.
            self._asked = "SLURM_JOB_ID" in os.environ

        before = signal.signal(signal.SIGTERM, asked)
        self._process = subprocess.Popen(command, env=environ, preexec_fn=_prepare_child)
        try:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            code = self._process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        return shell_code(code)


def _prepare_child() -> None:
    die_with_parent(signal.SIGTERM)
    for number in _WARNINGS:
        signal.signal(number, signal.SIG_IGN)


def starter(tasks: int, environ: Mapping[str, str]) -> list[str]:
    """What comes before ``python -m hpcft.run`` to start so many tasks; nothing on one node."""
    nodes = int(environ.get("SLURM_JOB_NUM_NODES", "1")) if "SLURM_JOB_ID" in environ else 1
    if nodes == 1:
        return []
    nodes = min(nodes, tasks)
    each = f"--ntasks-per-node={math.ceil(tasks / nodes)}"
    size = [f"--nodes={nodes}", f"--ntasks={tasks}", each]
    return ["srun", *SRUN_OPTIONS.split(), "--overlap", *size]


def without_step(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what it says of the step this process is a task of."""
    return {name: value for name, value in environ.items() if not _OF_A_STEP.match(name)}


def _story(rundir: RunDirectory, code: int) -> str:
    """Why a run has failed, with what its ranks have said of that."""
    summary = rundir.summary()
    reason = summary["reason"] if summary else f"it ended with exit code {code}"
    lines = [f"the run in {rundir.path} has failed: {reason}"]
    known = sorted((rundir.path / "logs").glob("rank-*.log"))
    for log in known:
        said = log.read_text(errors="replace")
        at = said.rfind("Traceback (most recent call last):")
        if at >= 0:
            lines += ["", f"{log.stem} says:", said[at:].rstrip()]
            break
    else:
        if known:
            last = known[0].read_text(errors="replace").splitlines()[-_LINES:]
            lines += ["", f"{known[0].stem} says at last:", *last]
    return "\n".join(lines)
