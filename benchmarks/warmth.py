"""How long a failure stops the training, by how warm what goes on is; stage by stage.

From SIGKILL to the end of the next step. What fails is one rank, but in the last three rows all:

    spare, warm        the spare has run its script, and waits
    spare, cold        it has let go of what its script had made, for memory was short
    relaunch           all ranks are forked again from their warm processes, without the dataset
    torchrun           torchrun starts all ranks again; a checkpoint in memory (/dev/shm)
    cold restart       the command is given again: launcher, shepherds, interpreters and all

Stages: process (a new one is there; failures are noticed before that), libraries (Python and torch
are imported), communicator (MPI or gloo is started, or healed), dataset (is read and normalised),
model (is built, wrapped, and tried out), parameters (are those of the last step, from a survivor or
a checkpoint), step (the next is done). A spare is made cold by a limit on the memory of a control
group, which needs root; without it that row is left out.

    python benchmarks/warmth.py                      2 ranks, 10 M parameters, 256 MiB of data
    python benchmarks/warmth.py --times 1 --data 64  quickly
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from limits import MemoryGroup
from peers import HpcftRun, Run, TorchrunRun, born, machine

#: Seconds until a spare has tried out its steps, and until one that is cold has said so.
_SETTLED, _COOLED = 5.0, 30.0


@dataclass(frozen=True)
class Stages:
    """What the time went into; all in seconds."""

    process: float = 0.0
    libraries: float = 0.0
    communicator: float = 0.0
    dataset: float = 0.0
    model: float = 0.0
    parameters: float = 0.0
    step: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


def _kill(*pids: int) -> float:
    at = time.time()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return at


def _noted(run: Run, pid: int) -> dict[str, float]:
    """When a process came to each stage, the last time it did."""
    return {stage: at for who, stage, at in run.stages() if who == pid}


def of_spare(args: argparse.Namespace, group: MemoryGroup | None) -> Stages:
    """Kill a rank beside a spare; one that is cold, if there is a group to limit."""
    workload = [*_workload(args), "--stages", "{path}/stages"]
    enter = group.enter if group else None
    with HpcftRun(args.ranks, 1, workload, enter=enter) as run:
        run.more_steps(8)
        time.sleep(_SETTLED)
        if group:
            # Less than a tenth of it is left: tight, and no more than that.
            group.limit(int(1.06 * group.used))
            run.wait_for("a cold spare", lambda: run.events("spare cooled"), _COOLED)
            group.limit(1 << 40)
        run.more_steps(4)
        killed = _kill(run.ranks()[-1]["pid"])
        run.wait_for("the recovery", lambda: run.events("recovered"))
        resumed, stepped = run.events("resume")[0], run.events("recovered")[0]
        phases = resumed["detail"]["phases"]
        adopted = run.ranks()[-1]["pid"]
        noted = _noted(run, adopted)
    warm, dataset, model = phases.get("warm_s", 0.0), 0.0, 0.0
    if warm:
        dataset = noted["dataset"] - noted["libraries"]
        model = warm - dataset
    rest = resumed["time"] - killed - warm - phases["transfer_s"]
    return Stages(
        communicator=rest,
        dataset=dataset,
        model=model,
        parameters=phases["transfer_s"],
        step=stepped["time"] - resumed["time"],
    )


def _first_after(run: Run, killed: float) -> tuple[float, int]:
    """When the first step after that was done, and by whom."""
    known = {stamp.pid for stamp in run.stamps() if stamp.time < killed}

    def first() -> tuple[float, int] | None:
        return next(((s.time, s.pid) for s in run.stamps() if s.pid not in known), None)

    return run.wait_for("the next step", first)


def _of_start(run: Run, killed: float, end: float, pid: int, libraries: float) -> Stages:
    """Of a start by hpcft; ``libraries``: when the warm process began to import them."""
    noted = _noted(run, pid)
    forked = noted["process"]
    return Stages(
        process=(libraries or forked) - killed,
        libraries=forked - libraries if libraries else 0.0,
        communicator=noted["libraries"] - forked,
        dataset=noted["dataset"] - noted["libraries"],
        model=noted["model"] - noted["dataset"],
        parameters=noted["parameters"] - noted["model"],
        step=end - noted["parameters"],
    )


def relaunch(args: argparse.Namespace, folder: str) -> Stages:
    """Kill all ranks, whose shepherds start them again."""
    with _saving(args, folder) as run:
        run.more_steps(12)
        killed = _kill(*(entry["pid"] for entry in run.ranks()))
        end, pid = _first_after(run, killed)
        return _of_start(run, killed, end, pid, 0.0)


def restart(args: argparse.Namespace, folder: str) -> Stages:
    """Kill all that there is of a run, and give its command again."""
    with _saving(args, folder) as run:
        run.more_steps(12)
        launcher = psutil.Process(run.process.pid)
        below = [process.pid for process in launcher.children(recursive=True)]
        killed = _kill(run.process.pid, *below)
        with _saving(args, folder) as again:
            end, pid = _first_after(again, killed)
            below = psutil.Process(again.process.pid).children()
            warm = [one.pid for one in below if "hpcft.world.rank" in one.cmdline()]
            return _of_start(again, killed, end, pid, min(map(born, warm)))


def torchrun(args: argparse.Namespace) -> Stages:
    """Kill a rank under torchrun, which then starts all of them again."""
    workload = [*_workload(args), "--stages", "{path}/stages", "--save-every", "5"]
    with TorchrunRun(args.ranks, workload) as run:
        run.more_steps(12)
        killed = _kill(run.workers()[-1])
        end, pid = _first_after(run, killed)
        noted = _noted(run, pid)
        order = ["process", "libraries", "communicator", "dataset", "model", "parameters"]
        times = [killed, *(noted[name] for name in order), end]
        return Stages(*(b - a for a, b in itertools.pairwise(times)))


def _workload(args: argparse.Namespace) -> list[str]:
    return ["--params", str(args.params), "--data", args.file, "--pace", "0.02"]


def _saving(args: argparse.Namespace, folder: str) -> HpcftRun:
    options = ["--ckpt-dir", folder, "--ckpt-every", "5", "--max-relaunch", "1000000"]
    return HpcftRun(args.ranks, 0, [*_workload(args), "--stages", "{path}/stages"], *options)


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/dev/shm")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _cold_spare(args: argparse.Namespace) -> Stages | None:
    try:
        group = MemoryGroup("hpcft-benchmark")
    except SystemExit as error:
        print(f"spare, cold: left out: {error}", file=sys.stderr)
        return None
    with group:
        return of_spare(args, group)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--params", type=float, default=10e6)
    parser.add_argument("--data", type=int, default=256, metavar="MIB", help="on disk (256)")
    parser.add_argument("--times", type=int, default=3, help="of each, in turns (default 3)")
    args = parser.parse_args()
    found: dict[str, list[Stages]] = {
        name: [] for name in ("spare, warm", "spare, cold", "relaunch", "torchrun", "cold restart")
    }
    with tempfile.TemporaryDirectory(prefix="hpcft-benchmark-") as home:
        args.file = str(Path(home) / "data.npy")
        examples = np.random.default_rng(0).standard_normal((args.data << 9, 1024))
        np.save(args.file, examples.astype(np.float16))
        del examples
        for _ in range(args.times):
            found["spare, warm"].append(of_spare(args, None))
            if cold := _cold_spare(args):
                found["spare, cold"].append(cold)
            with _folder() as folder:
                found["relaunch"].append(relaunch(args, folder))
            found["torchrun"].append(torchrun(args))
            with _folder() as folder:
                found["cold restart"].append(restart(args, folder))
    _print(args, found)


def _print(args: argparse.Namespace, found: dict[str, list[Stages]]) -> None:
    names = [field.name for field in fields(Stages)]
    print(
        f"{machine()}; {args.ranks} ranks, {args.params / 1e6:g} M parameters, {args.data} MiB of "
        f"data; medians of {args.times}, in seconds\n"
    )
    print(f"| | total | {' | '.join(names)} | cold restart takes |\n|---|---{'|---' * 8}|")
    slowest = median(one.total for one in found["cold restart"])
    for name, ones in found.items():
        if ones:
            total = median(one.total for one in ones)
            parts = " | ".join(f"{median(getattr(one, n) for one in ones):.3f}" for n in names)
            print(f"| {name} | {total:.3f} | {parts} | {slowest / total:.1f} times as long |")


if __name__ == "__main__":
    main()
