"""The options of ``python -m hpcft.run``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import UsageError

_DESCRIPTION = """\
Start a PyTorch training whose ranks may die.

Alone on a machine this starts the ranks itself:
    python -m hpcft.run --nproc 4 --spares 1 train.py --steps 1000
In a Slurm allocation srun starts them, and --nproc follows from its --ntasks:
    srun --mpi=pmix --kill-on-bad-exit=0 --no-kill --wait=0 -N4 --ntasks-per-node=2 \\
        python -m hpcft.run --spares 1 train.py --steps 1000
Under mpiexec the ranks are taken as they are.

Some of the ranks are parked as spares: they load all that training needs and wait. When a rank
fails a spare takes its place; with none left the job goes on with fewer ranks.
"""

_EPILOG = """\
exit codes: the script's own; 2 wrong usage, nothing was started; 3 too many failures to go on;
130 interrupted. What happened is in the run directory: summary.json, events.jsonl, ranks.json
and logs/.
"""


_UNITS = {"s": 1, "m": 60, "h": 3600}
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class RunOptions:
    """What the user asked for; see :func:`parse` for the meaning of each."""

    target: tuple[str, ...]
    module: bool
    nproc: int | None
    spares: int
    min_ranks: int
    on_failure: tuple[str, ...]
    run_dir: Path
    timeout_detect: float
    timeout_progress: float
    verbose: int
    warm: bool
    digest: bool
    checkpoints: CheckpointOptions | None


@dataclass(frozen=True)
class CheckpointOptions:
    """Where checkpoints go, and how often.

    directory: None without checkpoints.
    every: steps, or seconds if ``timed``, between them.
    keep: how many of the newest to keep.
    memory: bytes of staging memory a rank.
    bandwidth: bytes a second a rank writes at most; 0 is no limit.
    overlap: copy the state while the next step computes.
    """

    directory: str
    every: float
    timed: bool
    keep: int
    memory: int
    bandwidth: int
    overlap: bool


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hpcft.run",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # Else options of the script's would count as short for ours.
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--nproc",
        type=int,
        metavar="N",
        help="ranks that train, spares not counted (default: alone on a machine 1; otherwise what "
        "srun or mpiexec has started, less the spares)",
    )
    add("--spares", type=int, default=0, metavar="S", help="ranks parked as spares (default 0)")
    add(
        "--min-ranks",
        type=int,
        default=1,
        metavar="M",
        help="end the job rather than go on with fewer ranks than this (default 1)",
    )
    add(
        "--on-failure",
        default="substitute,shrink",
        metavar="WAYS",
        help="what may be done about a failure, in this order: substitute (a spare takes the "
        "failed rank), shrink (go on with fewer ranks) (default substitute,shrink)",
    )
    add(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where logs, events and the summary go, the same path on all nodes (default "
        "hpcft-runs/ and the Slurm job's number or the time)",
    )
    add(
        "--timeout-detect",
        type=float,
        default=0.8,
        metavar="SEC",
        help="silence after which a hung or cut-off rank is declared dead (default 0.8); a rank "
        "that merely computes is never silent",
    )
    add(
        "--timeout-progress",
        type=float,
        default=300.0,
        metavar="SEC",
        help="a rank that neither completes a step, nor waits for others, nor uses the processor "
        "for so long is stuck: its stacks go to its log and it is replaced; 0 means never "
        "(default 300)",
    )
    add(
        "--ckpt-dir",
        type=Path,
        metavar="DIR",
        help="save checkpoints here, the same path on all nodes, and start from the newest one if "
        "there is one (default: none are saved)",
    )
    add(
        "--ckpt-every",
        default="10m",
        metavar="TIME|STEPS",
        help="between checkpoints: 30s, 10m, 1h, or a number of steps (default 10m)",
    )
    add("--ckpt-keep", type=int, default=3, metavar="K", help="keep the newest K (default 3)")
    add(
        "--ckpt-memory",
        default="1G",
        metavar="SIZE",
        help="staging memory of each rank, such as 512M; training waits for the disk only if the "
        "rank's share of the state is larger (default 1G)",
    )
    add(
        "--ckpt-bandwidth",
        default="0",
        metavar="SIZE",
        help="let each rank write at most so much a second, such as 200M (default 0: no limit)",
    )
    add(
        "--no-ckpt-overlap",
        dest="ckpt_overlap",
        action="store_false",
        help="copy the state before the next step begins, and not during it: for scripts that "
        "change parameters outside optimizer.step()",
    )
    add(
        "--verbose",
        type=int,
        choices=range(4),
        default=1,
        metavar="0..3",
        help="0 errors only, 1 progress and failures, 2 each event, 3 the output of all ranks "
        "(default 1)",
    )
    add(
        "--no-warm",
        dest="warm",
        action="store_false",
        help="do not run two dry steps on the spares; adopting one then takes longer",
    )
    add(
        "--no-digest",
        dest="digest",
        action="store_false",
        help="leave params_sha256 out of the summary",
    )
    add("-m", dest="module", action="store_true", help="SCRIPT is a module, as in python -m")
    add(
        "target",
        nargs=argparse.PARSER,
        metavar="SCRIPT",
        help="the training script (or module, with -m), and its arguments",
    )
    return parser


def parse(argv: list[str]) -> RunOptions:
    """Read the command line.

    Raises
    ------
    UsageError: an option makes no sense, or the script does not exist.
    """
    given = _parser().parse_args(argv)
    ways = tuple(way.strip() for way in given.on_failure.split(",") if way.strip())
    for way in ways:
        if way not in ("substitute", "shrink"):
            raise UsageError(
                f"--on-failure does not know {way!r}", "choose from substitute and shrink"
            )
    for name, least in (("nproc", 1), ("spares", 0), ("min_ranks", 1)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise UsageError(
                f"--{name.replace('_', '-')} {value} makes no sense", f"give {least} or more"
            )
    # So written that nan is refused as well.
    if not given.timeout_detect >= 0.1:
        raise UsageError(
            f"--timeout-detect {given.timeout_detect} is too short to tell a busy node from a "
            "dead one",
            "give 0.1 or more",
        )
    if not given.timeout_progress >= 0:
        raise UsageError(
            f"--timeout-progress {given.timeout_progress} makes no sense",
            "give 0 to never look for stuck ranks",
        )
    target = given.target[1:] if given.target[0] == "--" else given.target
    if not target:
        raise UsageError("there is no SCRIPT", "name one, or -m MODULE")
    _check_target(target[0], given.module)
    return RunOptions(
        target=tuple(target),
        module=given.module,
        nproc=given.nproc,
        spares=given.spares,
        min_ranks=given.min_ranks,
        on_failure=ways,
        run_dir=(given.run_dir or _default_run_dir()).absolute(),
        timeout_detect=given.timeout_detect,
        timeout_progress=given.timeout_progress,
        verbose=given.verbose,
        warm=given.warm,
        digest=given.digest,
        checkpoints=_checkpoints(given),
    )


def _checkpoints(given: argparse.Namespace) -> CheckpointOptions | None:
    if given.ckpt_dir is None:
        return None
    every, timed = _interval(given.ckpt_every)
    memory = _size("--ckpt-memory", given.ckpt_memory)
    if memory < 16 << 20:
        raise UsageError(f"--ckpt-memory {given.ckpt_memory} is too little", "give 16M or more")
    if given.ckpt_keep < 1:
        raise UsageError(f"--ckpt-keep {given.ckpt_keep} would keep none", "give 1 or more")
    return CheckpointOptions(
        str(given.ckpt_dir.absolute()),
        every,
        timed,
        given.ckpt_keep,
        memory,
        _size("--ckpt-bandwidth", given.ckpt_bandwidth),
        given.ckpt_overlap,
    )


def _interval(text: str) -> tuple[float, bool]:
    """``30s`` as (30.0, True), ``100`` as (100.0, False)."""
    timed = text[-1:] in _UNITS
    try:
        number = float(text[:-1]) * _UNITS[text[-1]] if timed else float(int(text))
    except ValueError:
        number = 0.0
    # So written that nan is refused as well.
    if not 0 < number < float("inf"):
        raise UsageError(
            f"--ckpt-every {text!r} is neither a time nor a number of steps",
            "give something like 30s, 10m, 1h or 100",
        )
    return number, timed


def _size(option: str, text: str) -> int:
    """``512M`` in bytes."""
    digits = text.removesuffix("B").removesuffix("i")
    factor = _SIZES.get(digits[-1:].upper(), 1)
    try:
        size = int(float(digits[:-1] if factor > 1 else digits) * factor)
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise UsageError(f"{option} {text!r} is no size", "give bytes, or something like 512M, 2G")
    return size


def _check_target(script: str, module: bool) -> None:
    if not module:
        if not Path(script).is_file():
            raise UsageError(f"there is no script {script}", "check the path, or use -m MODULE")
        return
    try:
        # "__main__" would be found: it is this very program.
        found = script != "__main__" and importlib.util.find_spec(script) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise UsageError(f"there is no module {script}", "check the name and PYTHONPATH")


def _default_run_dir() -> Path:
    environ = os.environ
    if "SLURM_STEP_ID" in environ:
        name = f"{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
    elif "PMIX_NAMESPACE" in environ:
        name = "mpiexec-" + "".join(c if c.isalnum() else "-" for c in environ["PMIX_NAMESPACE"])
    else:
        name = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    return Path("hpcft-runs") / name


def check_sizes(options: RunOptions, tasks: int, starter: str) -> int:
    """Number of active ranks when ``starter`` has started ``tasks`` processes.

    Raises
    ------
    UsageError: they are too few, or not what ``--nproc`` says.
    """
    active = tasks - options.spares
    if active < 1:
        raise UsageError(
            f"--spares {options.spares} leaves no rank to train with: "
            f"{starter} has started {tasks}",
            "start more ranks or park fewer",
        )
    if options.nproc is not None and options.nproc != active:
        raise UsageError(
            f"--nproc {options.nproc} and --spares {options.spares} need "
            f"{options.nproc + options.spares} ranks, and {starter} has started {tasks}",
            f"leave --nproc away, or have {starter} start that many",
        )
    if options.min_ranks > active:
        raise UsageError(
            f"--min-ranks {options.min_ranks} is more than the {active} ranks there are",
            "give a lower --min-ranks",
        )
    return active
