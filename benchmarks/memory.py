"""Whether spares cost training ranks their lives where memory is short, and what that saves costs.

A run with spares is in a control group with a real limit, beside a load that uses memory and frees
it again, by a seed, and that the kernel does not kill. The limit is such that the ranks that train
have room beside the highest load, and warm spares besides have not. Each seed is run twice:

    always    spares stay warm (--spares-memory always)
    auto      spares let go of what they hold before memory is used up

Counted are the ranks that were training when they were killed for memory. When the load is gone
ranks are killed as well, one for each spare, to see how long the next step takes: where there is
memory for spares they are to be as good as those that stay warm, of a run without load and limit.
Needs root, for the control group.

    python benchmarks/memory.py                       2 ranks, 2 spares, 3 seeds, 10 minutes
    python benchmarks/memory.py --first 3             three more
    python benchmarks/memory.py --seeds 1 --peaks 2   quickly
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from limits import MemoryGroup
from peers import HERE, HpcftRun, machine

#: Seconds until spares have tried out their steps; between two peaks, at the least; and for
#: spares that are cold to be warm again after the last.
_SETTLED, _CALM, _WARM = 6.0, 3.0, 120.0
#: What is left free of the limit at the highest load with cold spares, of the limit.
_MARGIN = 0.14


@dataclass(frozen=True)
class Peak:
    """Of the load.

    height: of the highest there may be.
    rate: bytes a second by which it rises.
    hold: seconds it lasts.
    rest: seconds until the next.
    """

    height: float
    rate: float
    hold: float
    rest: float


@dataclass
class Found:
    """Of one run.

    killed: ranks that were killed for memory while they trained.
    spares: spares that were.
    cooled: times that a spare has let go of what it held.
    """

    killed: int
    spares: int
    cooled: int


def trace(seed: int, peaks: int) -> list[Peak]:
    """The load of a seed."""
    rng = random.Random(seed)
    return [
        Peak(
            rng.uniform(0.75, 1.0),
            rng.uniform(50, 400) * (1 << 20),
            rng.uniform(2, 6),
            _CALM + rng.uniform(0, 20),
        )
        for _ in range(peaks)
    ]


def _lost(run: HpcftRun, role: str) -> int:
    failures = [event["detail"] for event in run.events("failure")]
    return sum(one["role"] == role and "out of memory" in one["cause"] for one in failures)


def one(
    args: argparse.Namespace, mode: str, room: Room, peaks: list[Peak]
) -> tuple[Found, list[float]]:
    """A run under a load; and how long recoveries take when that is gone."""
    with MemoryGroup("hpcft-benchmark") as group, _started(args, mode, group) as run:
        group.limit(room.limit)
        with subprocess.Popen(
            [sys.executable, str(HERE / "hog.py")],
            stdin=subprocess.PIPE,
            preexec_fn=group.enter,
            text=True,
        ) as hog:
            assert hog.stdin is not None

            def go(size: float, rate: float) -> None:
                assert hog.stdin is not None
                print(int(size), int(rate), file=hog.stdin, flush=True)

            for peak in peaks:
                go(peak.height * room.highest, peak.rate)
                time.sleep(peak.height * room.highest / peak.rate + peak.hold)
                go(0, 1 << 30)
                time.sleep(peak.rest)
                if run.process.poll() is not None:
                    break
            hog.kill()
        cooled = len(run.events("spare cooled"))
        found = Found(_lost(run, "active"), _lost(run, "spare"), cooled)
        if mode == "always":
            return found, []
        group.limit(1 << 40)
        run.wait_for(
            "warm spares", lambda: len(run.events("spare warmed")) == cooled, seconds=_WARM
        )
        return found, _adoptions(args, run)


def undisturbed(args: argparse.Namespace) -> list[float]:
    """How long recoveries take with spares that were always warm."""
    with MemoryGroup("hpcft-benchmark") as group, _started(args, "always", group) as run:
        return _adoptions(args, run)


def _adoptions(args: argparse.Namespace, run: HpcftRun) -> list[float]:
    """Kill a rank for each spare; see how long the next step takes each time."""
    times = []
    for _ in range(args.spares):
        before = len(run.events("recovered"))
        run.more_steps(8)
        killed = time.time()
        os.kill(run.ranks()[-1]["pid"], signal.SIGKILL)
        run.wait_for("the recovery", lambda n=before: len(run.events("recovered")) > n)
        times.append(run.events("recovered")[-1]["time"] - killed)
    return times


def _started(args: argparse.Namespace, mode: str, group: MemoryGroup) -> HpcftRun:
    workload = ["--params", str(args.params), "--data", args.file, "--pace", "0.05"]
    memory = ["--spares-memory", mode]
    run = HpcftRun(args.ranks, args.spares, workload, *memory, enter=group.enter)
    run.more_steps(8)
    time.sleep(_SETTLED)
    return run


@dataclass(frozen=True)
class Room:
    """What the load is to find.

    limit: of the control group, in bytes.
    highest: that the load may be.
    """

    limit: int
    highest: int


def measure(args: argparse.Namespace) -> Room:
    """See what the run takes, with its spares warm and cold."""
    with MemoryGroup("hpcft-benchmark") as group, _started(args, "auto", group) as run:
        warm = group.used
        for number in range(1, args.spares + 1):
            group.limit(int(1.04 * group.used))
            run.wait_for(
                "a cold spare", lambda n=number: len(run.events("spare cooled")) >= n, seconds=60
            )
            time.sleep(1)
        cold = group.used
    # With warm spares there is room for a fifth of what they can give back; and for all of it, and
    # what is to stay free, if they do.
    back = warm - cold
    limit = int((warm + 0.2 * back) / (1 - _MARGIN))
    highest = int(limit * (1 - _MARGIN) - cold)
    print(
        f"{_gib(warm)} with warm spares, {_gib(cold)} with cold ones; limit {_gib(limit)}, "
        f"load up to {_gib(highest)}",
        flush=True,
    )
    return Room(limit, highest)


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument("--params", type=float, default=10e6)
    parser.add_argument("--data", type=int, default=128, metavar="MIB", help="on disk (128)")
    parser.add_argument("--seeds", type=int, default=3, help="loads (default 3)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--peaks", type=int, default=3, help="of each load (default 3)")
    args = parser.parse_args()
    found: dict[str, list[Found]] = defaultdict(list)
    times: dict[str, list[float]] = defaultdict(list)
    print(f"{machine()}; {args.ranks} ranks, {args.spares} spares")
    with tempfile.TemporaryDirectory(prefix="hpcft-benchmark-") as home:
        args.file = str(Path(home) / "data.npy")
        examples = np.random.default_rng(0).standard_normal((args.data << 9, 1024))
        np.save(args.file, examples.astype(np.float16))
        del examples
        room = measure(args)
        for seed in range(args.first, args.first + args.seeds):
            for mode in ("always", "auto"):
                what, recoveries = one(args, mode, room, trace(seed, args.peaks))
                found[mode].append(what)
                times[mode] += recoveries
                print(f"seed {seed}, {mode}: {what}", flush=True)
            times["always"] += undisturbed(args)
    _print(found, times)


def _print(found: dict[str, list[Found]], times: dict[str, list[float]]) -> None:
    print("\n| spares | ranks killed while training | spares killed | cooled | recovery, median |")
    print("|---|---|---|---|---|")
    for mode, ones in found.items():
        said = f"{1000 * median(times[mode]):.0f} ms ({len(times[mode])})"
        sums = [sum(getattr(one, name) for one in ones) for name in ("killed", "spares", "cooled")]
        print(f"| {mode} | {sums[0]} | {sums[1]} | {sums[2]} | {said} |")


if __name__ == "__main__":
    main()
