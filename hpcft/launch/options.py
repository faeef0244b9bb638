"""The options of ``python -m hpcft.run``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path

from hpcft.ckpt import near
from hpcft.ckpt.near import Copies, Tier
from hpcft.ckpt.policy import BEST, Best, Policy, Retention
from hpcft.errors import UsageError
from hpcft.launch import duties, upload
from hpcft.launch.duties import Duty
from hpcft.slurm import naming
from hpcft.telemetry.address import Address
from hpcft.telemetry.events import Echo
from hpcft.telemetry.rundir import RunDirectory
from hpcft.world.mode import Mode, Name
from hpcft.world.script import home

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
The first SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C has a training with --ckpt-dir save the step it is in
and leave; the second SIGTERM or Ctrl-C ends it at once.

exit codes: the script's own; 2 wrong usage, nothing was started; 3 too many failures to go on;
75 asked to end, and saved: the same command goes on from there; 130 interrupted. What happened is
in the run directory: summary.json, events.jsonl, ranks.json and logs/.
"""


_UNITS = {"s": 1, "m": 60, "h": 3600}
#: With ``auto``: seconds to the first saves, by which their cost becomes known, and at most.
_FIRST, _LONGEST = 10.0, 3600.0
_SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def at_terminal() -> bool:
    """Whether this process's run is watched at a terminal, through mpiexec or not."""
    return sys.stderr.isatty() or bool(os.environ.get("HPCFT_TERMINAL"))


@dataclass(frozen=True)
class RunOptions:
    """What the user asked for; see :func:`parse` for the meaning of each.

    argv: the command line itself.
    """

    argv: tuple[str, ...] = field(compare=False)
    target: tuple[str, ...]
    module: bool
    nproc: int | None
    most: int | None
    spares: int
    min_ranks: int
    on_failure: tuple[str, ...]
    mode: Mode
    spares_do: tuple[Duty, ...]
    spares_memory: str
    replace_stragglers: bool
    balance: bool
    run_dir: Path
    timeout_detect: float
    timeout_progress: float
    verbose: int
    warm: bool
    preload: tuple[str, ...]
    digest: bool
    checkpoints: Policy | None
    max_relaunch: int
    most_requeues: int | None
    metrics: Address | None
    tensorboard: Path | None
    upload: str | None

    @property
    def rundir(self) -> RunDirectory:
        """The run directory; what is added to its events is said if that is wanted."""
        return RunDirectory(self.run_dir, Echo(at_terminal()) if self.verbose >= 2 else None)

    @property
    def command(self) -> list[str]:
        """``SCRIPT ARGS...`` or ``-m MODULE ARGS...``."""
        return [*(["-m"] if self.module else []), *self.target]


@dataclass(frozen=True)
class Sizes:
    """How many ranks train.

    initial: in the first launch.
    most: ever.
    spares: to be parked.
    """

    initial: int
    most: int
    spares: int

    def share(self, ranks: int) -> int:
        """Of a launch of so many ranks, which may have lost some, and others have joined.

        As many as at first come before spares, and these before more.
        """
        return min(self.most, max(ranks - self.spares, min(ranks, self.initial)))


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
        metavar="N|MIN:MAX",
        help="ranks that train, spares not counted (default: alone on a machine 1; otherwise what "
        "srun or mpiexec has started, less the spares). With MIN:MAX those that `hpcft join` adds "
        "train, too, up to MAX ranks, and the run ends rather than train with fewer than MIN; "
        "alone on a machine it begins with MIN. Without MAX they are spares, or replace ranks that "
        "were lost",
    )
    add("--spares", type=int, default=0, metavar="S", help="ranks parked as spares (default 0)")
    add(
        "--spares-do",
        metavar="WHAT[,WHAT]",
        help="what spares do while they wait, and drop at once when they are needed. evaluate: one "
        "of them calls the script's job.run(..., evaluate=FUNCTION) with each new checkpoint of "
        "--ckpt-dir, in a process of its own. copies: nodes that have only spares keep the partner "
        "copies of --ckpt-near, so that the memory of those that train is not used for them. "
        "drain: one of them writes the checkpoints of --ckpt-every to --ckpt-dir, from what "
        "--ckpt-near has saved, so that the ranks that train need not (default: they only wait)",
    )
    add(
        "--spares-memory",
        choices=("auto", "always"),
        default="auto",
        help="what becomes of spares where memory is short. auto: before it is used up there, and "
        "the kernel kills a rank, spares let go of the model and the data, and run their script "
        "again when there is memory, or when they are needed (a recovery then takes as long as "
        "that); copies of other nodes' checkpoints are given up after that. always: they keep it "
        "all, whatever happens; docs/spares.md tells more (default auto)",
    )
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
        "--mode",
        choices=("sync", "backup", "local-sgd", "async"),
        help="how the ranks work together. sync: every step takes the gradients of all ranks. "
        "backup: of those that come first, see --backup. local-sgd: each rank steps on its own, "
        "and now and then all average their parameters, see --sync-every. async: each sends what "
        "its steps change to all others, and waits for nobody, see --staleness. The script is the "
        "same for all; docs/modes.md helps to choose (default sync)",
    )
    add(
        "--backup",
        type=int,
        metavar="B",
        help="with --mode backup, which it stands for as well: the first gradients make a step, of "
        "all ranks but B; who is late drops its own, and goes on with the others at the next step "
        "(default 1)",
    )
    add(
        "--replace-stragglers",
        action="store_true",
        help="have a rank that computes lastingly longer than the others change places with a "
        "spare, at the end of a step; nothing is lost. It waits as a spare, and is trusted again "
        "when it has become as fast as the others; at most one such change a minute. Needs "
        "--spares (default: stragglers are reported, and stay)",
    )
    add(
        "--sync-every",
        type=int,
        metavar="H",
        help="with --mode local-sgd: steps from one averaging to the next (default 8)",
    )
    add(
        "--elastic",
        type=float,
        metavar="A",
        help="with --mode local-sgd: how far each rank moves towards the average, above 0 and up "
        "to 1, which is all of the way; less lets ranks explore (default 1)",
    )
    add(
        "--staleness",
        type=int,
        metavar="K",
        help="with --mode async: a rank that is K steps ahead of the slowest waits for it "
        "(default 64)",
    )
    add(
        "--balance",
        action="store_true",
        help="where ranks differ lastingly in speed, share the batch out in proportion, and "
        "average accordingly; for scripts with one hpcft.ElasticBatchSampler. Who has which "
        "samples then follows from measured times, and is not the same in another run (default: "
        "all ranks have the same)",
    )
    add(
        "--max-relaunch",
        type=int,
        metavar="N",
        help="when the ranks cannot go on, though spares and shrinking are tried first, start all "
        "again, where the shepherds still are, from the newest checkpoint: so often in an hour "
        "(default 3 with --ckpt-dir, 0 without)",
    )
    add(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where logs, events and the summary go, the same path on all nodes (default "
        "hpcft-runs/ and the Slurm job's number, with how often it was requeued, or the time); %%j "
        "is the job's number, %%A_%%a that of a job array and its task",
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
        "there is one; %%a is the number of the task in a job array (default: none are saved)",
    )
    add(
        "--ckpt-every",
        default="10m",
        metavar="TIME|STEPS|auto",
        help="between checkpoints: 30s, 10m, 1h, or a number of steps; auto: what costs least, by "
        "what a save is measured to cost this training and by how often a failure has needed one, "
        "adjusted as that becomes known, and at most 1h, or TIME with auto:TIME (default 10m)",
    )
    add("--ckpt-keep", type=int, default=3, metavar="K", help="keep the newest K (default 3)")
    add(
        "--ckpt-keep-nth",
        type=int,
        default=0,
        metavar="N",
        help="keep also all whose step is a multiple of N (default: none)",
    )
    add(
        "--ckpt-keep-best",
        metavar="METRIC[:max][:K]",
        help=f"keep also {BEST}",
    )
    add(
        "--ckpt-layout",
        choices=("auto", "shared", "per-rank"),
        default="auto",
        help="shared: all ranks write one file; per-rank: each writes its parts of large tensors "
        "to a file of its own beside it; auto goes by the file system, and events.jsonl says what "
        "was chosen and why. Either is restored on any number of ranks (default auto)",
    )
    add(
        "--ckpt-memory",
        default="1G",
        metavar="SIZE",
        help="staging memory of each rank, such as 512M; training waits for the disk only if the "
        "rank's share of the state is larger; for each --ckpt-near as much again (default 1G)",
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
        "--ckpt-near",
        action="append",
        default=[],
        metavar="TIME|STEPS|auto[:DIR]",
        help="besides, so often (auto: as for --ckpt-every), keep the state in the nodes' memory: "
        "each rank's part on its own node, with a copy on another, so that most restores need no "
        "file; that takes twice the memory of the state, and four times as much while it is "
        "renewed. With DIR on the nodes' own disks, there. May be given more than once (default: "
        "not)",
    )
    add(
        "--ckpt-near-copies",
        default="partner",
        metavar="partner|xor[:N]|none",
        help="partner: another node has a copy of each rank's part; xor: sets of N nodes (default "
        "8) keep parity, which takes a seventh of that memory and heals the loss of one node in "
        "a set; none (default partner)",
    )
    add(
        "--ckpt-timeout",
        type=float,
        metavar="SEC",
        help="a file system that gets nothing done for so long fails the save, where training "
        "would have to wait for it, and goes on without; so long a start waits for another run "
        "that still uses --ckpt-dir; less than --timeout-progress (default 120, or half of "
        "--timeout-progress if that is less)",
    )
    add(
        "--requeue",
        action="store_true",
        help="in a Slurm batch job: when it is warned of its end (sbatch --signal=USR1@120, "
        "preemption) and has saved, or when too many ranks have failed, have Slurm start it again, "
        "without the nodes it has lost",
    )
    add(
        "--max-requeue",
        type=int,
        metavar="N",
        help="but not more than N times (default 100), and not if nothing new was saved since the "
        "last start",
    )
    add(
        "--metrics-port",
        metavar="[HOST:]PORT",
        help="serve the run's figures to Prometheus at http://HOST:PORT/metrics, from the node of "
        "the lowest rank's shepherd, also when ranks fail; 0 picks a free port, and status.json "
        "says which; whoever reaches the port can read them, so on a shared machine give "
        "127.0.0.1:PORT (default: not; HOST: all interfaces)",
    )
    add(
        "--tensorboard",
        action="store_true",
        help="write the script's metrics, and the run's own figures, step by step for TensorBoard "
        "to tensorboard/ in the run directory; needs tensorboardX (default: not)",
    )
    add(
        "--tensorboard-dir",
        type=Path,
        metavar="DIR",
        help="write them there, the same path on all nodes; a run that goes on from a checkpoint "
        "goes on in the same curves",
    )
    add(
        "--upload",
        metavar="URL",
        help="when the run has ended, well or not, copy what it leaves to URL/ and the run "
        "directory's name: a directory, s3://bucket/runs, or whatever fsspec knows; not "
        "checkpoints. URL is tried before training begins; if the upload fails the run is kept "
        "where it is, and its exit code is its own (default: not)",
    )
    add(
        "--verbose",
        type=int,
        choices=range(4),
        default=1,
        metavar="0..3",
        help="0 errors only, and what rank 0 prints; 1 also warnings, progress and failures; 2 "
        "also each event as it goes to events.jsonl, and why shepherds give up; 3 also what the "
        "other ranks print, a number before each line (default 1)",
    )
    add(
        "--no-warm",
        dest="warm",
        action="store_false",
        help="do not run two dry steps on the spares; adopting one then takes longer",
    )
    add(
        "--preload",
        action="append",
        default=[],
        metavar="MODULE[,MODULE...]",
        help="import these modules of the script's before a rank is forked, so that a rank that is "
        "started again has at once what they have loaded. That is done once, and not by each rank: "
        "LOCAL_RANK and RANK are not set yet, every rank's random numbers go on from where the "
        "module has left them, and MPI, GPUs and threads, such as torch's own, cannot be used "
        "(default: none)",
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
    nproc, most = _nproc(given.nproc)
    if most is not None:
        given.min_ranks = max(given.min_ranks, nproc)
    for name, least in (("spares", 0), ("min_ranks", 1), ("max_relaunch", 0)):
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
    preload = tuple(name for names in given.preload for name in names.split(","))
    _check_preload(preload, home(["-m", *target] if given.module else target))
    run_dir = _run_dir(given.run_dir)
    mode = _mode(given)
    return RunOptions(
        argv=tuple(argv),
        target=tuple(target),
        module=given.module,
        nproc=nproc,
        most=most,
        spares=given.spares,
        min_ranks=given.min_ranks,
        on_failure=ways,
        mode=mode,
        spares_do=_spares_do(given),
        spares_memory=given.spares_memory,
        replace_stragglers=_replace_stragglers(given, ways, mode),
        balance=_balance(given, mode),
        run_dir=run_dir,
        timeout_detect=given.timeout_detect,
        timeout_progress=given.timeout_progress,
        verbose=given.verbose,
        warm=given.warm,
        preload=preload,
        digest=given.digest,
        checkpoints=_checkpoints(given),
        max_relaunch=(3 if given.ckpt_dir else 0)
        if given.max_relaunch is None
        else given.max_relaunch,
        most_requeues=_most_requeues(given),
        metrics=None
        if given.metrics_port is None
        else Address.parse("--metrics-port", given.metrics_port),
        tensorboard=_tensorboard(given, run_dir),
        upload=None if given.upload is None else upload.place(given.upload),
    )


#: What an option of a mode's own is for, what it may be, and in words.
_OF_MODES: dict[str, tuple[Name, Callable[[float], bool], str]] = {
    "backup": ("backup", lambda value: value >= 1, "give 1 or more"),
    "sync_every": ("local-sgd", lambda value: value >= 1, "give 1 or more"),
    "elastic": ("local-sgd", lambda value: 0 < value <= 1, "give a number above 0 and up to 1"),
    "staleness": ("async", lambda value: value >= 1, "give 1 or more"),
}


def _mode(given: argparse.Namespace) -> Mode:
    name: Name = given.mode or ("sync" if given.backup is None else "backup")
    chosen = {option: value for option in _OF_MODES if (value := vars(given)[option]) is not None}
    for option, value in chosen.items():
        mode, good, remedy = _OF_MODES[option]
        written = "--" + option.replace("_", "-")
        if mode != name:
            remedy = f"leave it away, or give --mode {mode}"
            raise UsageError(f"{written} is not for --mode {name}", remedy)
        if not good(value):
            raise UsageError(f"{written} {value:g} makes no sense", remedy)
    if name == "async" and given.ckpt_near:
        raise UsageError(
            "--ckpt-near is not for --mode async, in which ranks do not save together",
            "leave it away: --ckpt-dir with --ckpt-every holds nobody up in this mode",
        )
    return Mode(name, **({"backup": 1} if name == "backup" else {}) | chosen)


def _spares_do(given: argparse.Namespace) -> tuple[Duty, ...]:
    if given.spares_do is None:
        return ()
    near, partner = bool(given.ckpt_near), given.ckpt_near_copies == "partner"
    saves = given.ckpt_dir is not None
    return duties.parse(given.spares_do, given.spares, saves, near, near and partner)


def _replace_stragglers(given: argparse.Namespace, ways: tuple[str, ...], mode: Mode) -> bool:
    wanted: bool = given.replace_stragglers
    if wanted and not given.spares:
        raise UsageError(
            "--replace-stragglers has nobody to replace them with", "give --spares 1 or more"
        )
    if wanted and "substitute" not in ways:
        raise UsageError(
            "--replace-stragglers is for spares that may take a rank's place",
            "leave substitute in --on-failure",
        )
    if wanted and mode.name != "sync":
        raise UsageError(
            f"--replace-stragglers is not for --mode {mode.name}, in which a slow rank holds up "
            "nobody",
            "leave one of them away",
        )
    return wanted


def _balance(given: argparse.Namespace, mode: Mode) -> bool:
    wanted: bool = given.balance
    if wanted and mode.name != "sync":
        raise UsageError(
            f"--balance is for steps that all ranks take together, and not for --mode {mode.name}",
            "leave one of them away",
        )
    return wanted


def _tensorboard(given: argparse.Namespace, run_dir: Path) -> Path | None:
    if not (given.tensorboard or given.tensorboard_dir):
        return None
    if importlib.util.find_spec("tensorboardX") is None:
        raise UsageError(
            "--tensorboard needs the package tensorboardX, which is not installed",
            "pip install tensorboardX",
        )
    folder: Path = given.tensorboard_dir or RunDirectory(run_dir).tensorboard_folder
    return folder.absolute()


def _nproc(text: str | None) -> tuple[int | None, int | None]:
    """``4``, or ``2:8``."""
    if text is None:
        return None, None
    least, colon, most = text.partition(":")
    try:
        numbers = int(least), int(most) if colon else None
    except ValueError:
        numbers = 0, None
    if numbers[0] < 1 or (numbers[1] is not None and numbers[1] < numbers[0]):
        raise UsageError(f"--nproc {text} makes no sense", "give N, or MIN:MAX, from 1 on")
    return numbers


def _most_requeues(given: argparse.Namespace) -> int | None:
    """How often a job may be requeued; None for never."""
    most: int | None = given.max_requeue
    if most is not None and most < 1:
        raise UsageError(f"--max-requeue {most} makes no sense", "give 1 or more")
    if not given.requeue:
        if most is not None:
            raise UsageError("--max-requeue is given without --requeue", "give both")
        return None
    if given.ckpt_dir is None:
        raise UsageError(
            "--requeue would start the training from its beginning", "give --ckpt-dir as well"
        )
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError(
            "--requeue is for Slurm's batch jobs, and this is none", "submit it with sbatch"
        )
    return 100 if most is None else most


def _checkpoints(given: argparse.Namespace) -> Policy | None:
    if given.ckpt_dir is None:
        if given.ckpt_near:
            raise UsageError(
                "--ckpt-near is for the time between checkpoints", "give --ckpt-dir as well"
            )
        return None
    every, timed, longest = _ckpt_every(given.ckpt_every)
    naming.require_own("--ckpt-dir", given.ckpt_dir, os.environ)
    directory = str(naming.expand("--ckpt-dir", given.ckpt_dir, os.environ).absolute())
    memory = size("--ckpt-memory", given.ckpt_memory)
    if memory < 16 << 20:
        raise UsageError(f"--ckpt-memory {given.ckpt_memory} is too little", "give 16M or more")
    if given.ckpt_keep < 1:
        raise UsageError(f"--ckpt-keep {given.ckpt_keep} would keep none", "give 1 or more")
    if given.ckpt_keep_nth < 0:
        raise UsageError(f"--ckpt-keep-nth {given.ckpt_keep_nth} makes no sense", "give 0 or more")
    best = None if given.ckpt_keep_best is None else Best.parse(given.ckpt_keep_best)
    return Policy(
        directory,
        every,
        timed,
        Retention(given.ckpt_keep, given.ckpt_keep_nth, best),
        memory,
        size("--ckpt-bandwidth", given.ckpt_bandwidth),
        given.ckpt_overlap,
        _ckpt_timeout(given.ckpt_timeout, given.timeout_progress),
        given.ckpt_layout,
        tuple(_tier(text, directory, given.ckpt_near_copies) for text in given.ckpt_near),
        longest,
    )


def _ckpt_every(text: str) -> tuple[float, bool, float | None]:
    """``10m``, ``500``, ``auto``, ``auto:4h``: the (first) interval, if timed, the longest."""
    auto, colon, most = text.partition(":")
    if auto != "auto":
        return *_interval("--ckpt-every", text), None
    longest, timed = _interval("--ckpt-every auto:", most) if colon else (_LONGEST, True)
    if not timed:
        raise UsageError(f"--ckpt-every {text!r} has no time", "give something like auto:4h")
    return min(_FIRST, longest), True, longest


def _tier(text: str, directory: str, redundancy: str) -> Tier:
    """``10`` or ``30s:/local/scratch``."""
    found = re.fullmatch(r"(partner|none)|(xor)(?::(\d{1,6}))?", redundancy)
    if not found or (found[3] and int(found[3]) < 2):
        raise UsageError(
            f"--ckpt-near-copies {redundancy!r} is not known",
            "give partner, none, xor or something like xor:4, for sets of 4 nodes",
        )
    often, _, base = text.partition(":")
    if base and not Path(base).is_absolute():
        raise UsageError(
            f"--ckpt-near {text!r} names no place that is the same on all nodes",
            "give the directory from / on",
        )
    auto = often == "auto"
    every, timed = (_FIRST, True) if auto else _interval("--ckpt-near", often)
    path = near.place(base or near.MEMORY, directory)
    copies: Copies = "xor" if found[2] else "partner" if found[1] == "partner" else "none"
    longest = _LONGEST if auto else None
    return Tier(every, timed, path, copies, int(found[3] or 8), longest)


def _ckpt_timeout(given: float | None, progress: float) -> float:
    if given is None:
        return min(120.0, progress / 2 or 120.0)
    # So written that nan is refused as well.
    if not 0 < given < (progress or float("inf")):
        raise UsageError(
            f"--ckpt-timeout {given:g} makes no sense",
            "give more than 0 and less than --timeout-progress, which would find the rank stuck",
        )
    return given


def _interval(option: str, text: str) -> tuple[float, bool]:
    """``30s`` as (30.0, True), ``100`` as (100.0, False)."""
    timed = text[-1:] in _UNITS
    try:
        number = float(text[:-1]) * _UNITS[text[-1]] if timed else float(int(text))
    except ValueError:
        number = 0.0
    # So written that nan is refused as well.
    if not 0 < number < float("inf"):
        raise UsageError(
            f"{option} {text!r} is neither a time nor a number of steps",
            "give something like 30s, 10m, 1h or 100, or auto",
        )
    return number, timed


def size(option: str, text: str) -> int:
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


def _check_preload(modules: Sequence[str], folder: str) -> None:
    for module in modules:
        if not _is_module(module, folder):
            raise UsageError(
                f"there is no module {module!r} to --preload in {folder}, nor where Python looks "
                "otherwise",
                "name it as the script imports it, without .py, and check PYTHONPATH",
            )


def _is_module(name: str, folder: str) -> bool:
    """Whether a script in ``folder`` can import this; nothing is imported to find out."""
    top, _, rest = name.partition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    path = [folder, *sys.path[1:]]
    for finder in sys.meta_path:
        spec = finder.find_spec(top, path if finder is PathFinder else None)
        if spec:
            return not rest or spec.submodule_search_locations is not None
    return False


def _run_dir(given: Path | None) -> Path:
    path = naming.expand("--run-dir", given, os.environ) if given else _default_run_dir()
    return path.absolute()


def _default_run_dir() -> Path:
    environ = os.environ
    if step := naming.run_name(environ):
        name = step
    elif "PMIX_NAMESPACE" in environ:
        name = "mpiexec-" + "".join(c if c.isalnum() else "-" for c in environ["PMIX_NAMESPACE"])
    else:
        name = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    return Path("hpcft-runs") / name


def check_sizes(options: RunOptions, tasks: int, starter: str) -> Sizes:
    """How many ranks train when ``starter`` has started ``tasks`` processes.

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
    if options.most is not None and active > options.most:
        raise UsageError(
            f"--nproc {options.nproc}:{options.most} and --spares {options.spares} take at most "
            f"{options.most + options.spares} ranks, and {starter} has started {tasks}",
            "raise MAX, or park more",
        )
    if options.nproc is not None and options.most is None and options.nproc != active:
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
    if options.mode.backup >= active:
        raise UsageError(
            f"--backup {options.mode.backup} leaves no gradients to step with: {active} train",
            "give less, or start more ranks",
        )
    return Sizes(active, options.most or active, options.spares)
