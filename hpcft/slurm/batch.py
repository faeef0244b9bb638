"""Writing a batch script that fits a training to a cluster."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from hpcft.errors import UsageError
from hpcft.slurm.cluster import Partition
from hpcft.telemetry.events import Event

#: Seconds before the time limit at which a job is warned, if nothing better is known.
_WARNING = 300
#: The same, at least; Slurm looks twice a minute.
_LEAST_WARNING = 120


@dataclass(frozen=True)
class Wanted:
    """What the user wants of a job.

    seconds: its time limit.
    ranks_per_node: None for one a GPU, or one where there are none.
    spares: ranks that are parked; None for those of a node, if there are several.
    spares_why: they are as many, and nobody has said so.
    warning: seconds before the time limit that it is warned; None for what saves have taken.
    options: of ``hpcft.run``.
    target: script and arguments, with ``-m`` if it is a module.
    """

    name: str
    nodes: int
    seconds: int
    ranks_per_node: int | None
    spares: int | None
    spares_why: str
    warning: int | None
    account: str | None
    ckpt_dir: str | None
    options: tuple[str, ...]
    target: tuple[str, ...]


def warning_time(saves: Iterable[Event], directory: str) -> tuple[int, str]:
    """How long before its end a job is to be warned, in seconds, and why.

    Parameters
    ----------
    saves: events of runs; those of checkpoints in ``directory`` count.
    """
    took = [
        float(e.detail["seconds"])
        for e in saves
        if e.kind == "checkpoint" and str(e.detail["path"]).startswith(directory + "/")
    ]
    if not took:
        return _WARNING, "no save into this directory was measured"
    longest = max(took)
    # Twice for a busy file system, and a minute for a step and for Slurm, which looks twice in it.
    return max(_LEAST_WARNING, round(2 * longest) + 60), f"the longest save took {longest:.1f} s"


def write(wanted: Wanted, partition: Partition, mpi: str, python: str, why: str) -> str:
    """The script.

    Parameters
    ----------
    mpi: what ``srun --mpi`` calls PMIx.
    python: the interpreter to start.
    why: the warning is as it is.

    Raises
    ------
    UsageError: it does not fit into the partition.
    """
    ranks = wanted.ranks_per_node or partition.gpus or 1
    spares = wanted.spares
    if spares is None:
        spares = ranks if wanted.nodes > 1 else 0
    _check(wanted, partition, ranks, spares)
    why_so = f": {wanted.spares_why}" if wanted.spares_why else ""
    gpus = partition.gpus > 0 and ranks <= partition.gpus
    lines = {
        f"job-name={wanted.name}": "",
        f"partition={partition.name}": "",
        **({f"account={wanted.account}": ""} if wanted.account else {}),
        f"nodes={wanted.nodes}": f"{wanted.nodes * ranks} ranks, {spares} of them spares{why_so}",
        f"ntasks-per-node={ranks}": "a rank a GPU" if gpus else "",
        f"cpus-per-task={max(1, partition.cpus // ranks)}": f"nodes have {partition.cpus}",
        **({f"gpus-per-node={ranks}": ""} if gpus else {}),
        f"time={_clock(wanted.seconds)}": "",
        "no-kill": "keep the allocation when a node of it fails",
        "output=%x-%j.out": "",
    }
    if wanted.ckpt_dir:
        lines |= {
            "open-mode=append": "one log of all restarts",
            "requeue": "Slurm may start it again",
            f"signal=USR1@{wanted.warning}": f"time to save: {why}",
        }
    head = [
        f"#SBATCH --{option}".ljust(36) + f"# {comment}" if comment else f"#SBATCH --{option}"
        for option, comment in lines.items()
    ]
    srun = [f"srun --mpi={mpi} --kill-on-bad-exit=0 --no-kill --wait=0"]
    srun += ['--cpus-per-task="$SLURM_CPUS_PER_TASK"' + (" --gpus-per-task=1" if gpus else "")]
    run = [python, "-m", "hpcft.run", "--spares", str(spares)]
    if wanted.ckpt_dir:
        run += ["--ckpt-dir", wanted.ckpt_dir, "--requeue"]
    words = [shlex.join([*run, *wanted.options]), shlex.join(wanted.target)]
    return "\n".join(
        [
            "#!/bin/bash",
            *head,
            "",
            "# srun takes the shell's place: what Slurm tells the shell it tells the ranks.",
            "exec " + " \\\n    ".join(srun + words),
            "",
        ]
    )


def _check(wanted: Wanted, partition: Partition, ranks: int, spares: int) -> None:
    name = f"partition {partition.name}"
    if not partition.up:
        raise UsageError(f"{name} takes no jobs now", "choose another with --partition")
    most = min(partition.nodes, partition.most_nodes or partition.nodes)
    if wanted.nodes > most:
        raise UsageError(
            f"--nodes {wanted.nodes} is more than the {most} that a job gets in {name}",
            "ask for fewer, or choose another with --partition",
        )
    if partition.most_seconds is not None and wanted.seconds > partition.most_seconds:
        raise UsageError(
            f"--time {_clock(wanted.seconds)} is more than {name} allows, which is "
            f"{_clock(int(partition.most_seconds))}",
            "ask for less: with --ckpt-dir the job is requeued, and goes on where it was",
        )
    if ranks > partition.cpus:
        raise UsageError(
            f"{ranks} ranks a node are more than the {partition.cpus} CPUs that a node of {name} "
            "has",
            "give fewer with --ranks-per-node",
        )
    if spares >= wanted.nodes * ranks:
        raise UsageError(
            f"--spares {spares} leaves none of {wanted.nodes * ranks} ranks to train with",
            "ask for more nodes or fewer spares",
        )
    if wanted.ckpt_dir and wanted.warning is not None and wanted.warning >= wanted.seconds:
        raise UsageError(
            f"of --time {_clock(wanted.seconds)} nothing is left when the job is warned "
            f"{wanted.warning} s before its end",
            "ask for more time, or less warning with --signal",
        )


def _clock(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02}:{rest // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock
