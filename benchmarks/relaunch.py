"""How long the loss of all ranks stops the training: relaunched warm, cold, and by torchrun.

From SIGKILL of every rank to the end of the next step. Warm: the shepherds stand, and fork ranks
from their warm processes. Cold: the launcher is killed as well, and the same command is given again
at once. torchrun starts the ranks again, and looks after them every 100 ms. All go on from a
checkpoint in memory (/dev/shm). With --load the script has a dataset that takes so many seconds to
load, and preloaded is warm once more, with that in the warm processes (--preload).

    python benchmarks/relaunch.py                 4 ranks, 1 M parameters, 5 times each, in turns
    python benchmarks/relaunch.py --times 10
    python benchmarks/relaunch.py --load 5        and a dataset of 5 s
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from statistics import median

from peers import HpcftRun, Run, TorchrunRun, machine


def _kill(pids: list[int]) -> float:
    at = time.time()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return at


def _after(run: Run, before: set[int]) -> float:
    """When the first step was done by a process not in ``before``; 0 if there is none."""
    return next((s.time for s in run.stamps() if s.pid not in before), 0.0)


def _workload(args: argparse.Namespace) -> list[str]:
    return ["--params", str(args.params), *(["--dataset"] if args.load else [])]


def _hpcft(args: argparse.Namespace, folder: str, *options: str) -> HpcftRun:
    keep = ["--ckpt-dir", folder, "--ckpt-every", "5", "--max-relaunch", "1000000"]
    return HpcftRun(args.ranks, 0, _workload(args), *keep, *options)


def warm(args: argparse.Namespace, *options: str) -> float:
    """Kill all ranks of a run; returns the seconds until the next step."""
    folder = tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/dev/shm")
    try:
        with _hpcft(args, folder, *options) as run:
            run.more_steps(12)
            before = {stamp.pid for stamp in run.stamps()}
            killed = _kill([entry["pid"] for entry in run.ranks()])
            return float(run.wait_for("the relaunch", lambda: _after(run, before))) - killed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cold(args: argparse.Namespace) -> float:
    """Kill a whole run and start another; returns the seconds until the next step."""
    folder = tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/dev/shm")
    try:
        with _hpcft(args, folder) as run:
            run.more_steps(12)
            killed = _kill([run.process.pid, *[entry["pid"] for entry in run.ranks()]])
            with _hpcft(args, folder) as again:
                return float(again.wait_for("the start", lambda: _after(again, set()))) - killed
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torchrun(run: TorchrunRun) -> float:
    """Kill all ranks of ``run``; returns the seconds until the next step."""
    run.more_steps(12)
    before = {stamp.pid for stamp in run.stamps()}
    killed = _kill(run.workers())
    return float(run.wait_for("the restart", lambda: _after(run, before))) - killed


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--params", type=float, default=1e6)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--load", type=float, default=0, metavar="SECONDS")
    args = parser.parse_args()
    os.environ["BENCHMARK_LOAD"] = str(args.load)
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(args.times):
        # One at a time, for they share the processors.
        found["warm"].append(warm(args))
        if args.load:
            found["preloaded"].append(warm(args, "--preload", "dataset"))
        found["cold"].append(cold(args))
        with TorchrunRun(args.ranks, [*_workload(args), "--save-every", "5"]) as peer:
            found["torchrun"].append(torchrun(peer))
    print(f"{machine()}; {args.ranks} ranks, {args.params / 1e6:g} M parameters; seconds\n")
    print("| | median | each | ratio to warm |\n|---|---|---|---|")
    for name, times in found.items():
        each = ", ".join(f"{t:.2f}" for t in times)
        ratio = median(times) / median(found["warm"])
        print(f"| {name} | {median(times):.2f} | {each} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
