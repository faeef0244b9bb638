"""Names of directories in which Slurm's patterns stand for numbers of the job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hpcft.errors import UsageError

#: As sbatch has them in names of files.
_PATTERNS = {"j": "SLURM_JOB_ID", "A": "SLURM_ARRAY_JOB_ID", "a": "SLURM_ARRAY_TASK_ID"}


def expand(option: str, path: Path, environ: Mapping[str, str]) -> Path:
    """``%j``, ``%A`` and ``%a`` in the path an option gives, filled in; ``%%`` is a percent sign.

    Raises
    ------
    UsageError: this is no job, or not one of an array, or it is another pattern.
    """

    def number(found: re.Match[str]) -> str:
        letter = found[1]
        if letter == "%":
            return letter
        if letter not in _PATTERNS:
            raise UsageError(f"{option} {path} has an unknown %{letter}", "use %j, %A, %a or %%")
        if _PATTERNS[letter] not in environ:
            kind = "job" if letter == "j" else "task of a job array"
            raise UsageError(
                f"{option} {path} has %{letter}, and this is no {kind}", "leave it out"
            )
        return environ[_PATTERNS[letter]]

    return Path(re.sub("%(.?)", number, str(path)))


def require_own(option: str, given: Path, environ: Mapping[str, str]) -> None:
    """See that the tasks of a job array do not share what one training alone may use.

    Raises
    ------
    UsageError: nothing in the name tells this task from the others.
    """
    task = environ.get("SLURM_ARRAY_TASK_ID")
    if task is None or re.search("%[jAa]", str(given)):
        return
    # The shell may have filled it in.
    if {task, environ["SLURM_JOB_ID"]} & set(re.findall(r"\d+", str(given))):
        return
    raise UsageError(
        f"{option} {given} is the same for all tasks of this job array",
        "put %a into it, the number of the task; or %A, that of the array, if only one runs at a "
        "time (sbatch --array=1-10%1)",
    )


def run_name(environ: Mapping[str, str]) -> str | None:
    """What to call a run of a step; another for each restart. None outside of a step."""
    if "SLURM_STEP_ID" not in environ:
        return None
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return f"{job}.{environ['SLURM_STEP_ID']}" + (f"-r{restarts}" if restarts != "0" else "")


def names_before(name: str) -> list[str]:
    """What :func:`run_name` has called the runs of the same step before its job was restarted.

    >>> names_before("17.0-r2")
    ['17.0', '17.0-r1']
    """
    found = re.fullmatch(r"(\d+(?:_\d+)?\.\d+)-r(\d{1,4})", name)
    if not found:
        return []
    return [found[1]] + [f"{found[1]}-r{restart}" for restart in range(1, int(found[2]))]
