"""What a spare costs, and what it costs to have it do something.

Parked, processor time of its rank and of its shepherd, in percent of a core:

    python benchmarks/spare.py --spares 2 --seconds 30

With --adoptions N, a rank is killed N times while its spare only waits, and N times while it is in
the middle of an evaluation, in turns: from SIGKILL to the end of the next step, and how long an
undisturbed step takes, in ms. Both save checkpoints.

    python benchmarks/spare.py --adoptions 10 --ranks 1

With --standstill, how long training stands still for checkpoints on a disk that is slow, for it is
frozen most of the time (as root): what steps take beyond twice their median, in seconds, where the
ranks write them and where a spare does (--spares-do drain). All save near the ranks as often.

    python benchmarks/spare.py --standstill --params 4e6 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
from peers import HpcftRun, machine, step_time

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from disks import Disk, mounted

from hpcft.world.progress import shepherd_of

#: Steps over which a step's length is taken.
_STEPS = 60
#: Seconds for which the slow disk is frozen, and then is not.
_FROZEN, _THAWED = 0.45, 0.05


def cpu_seconds(pid: int) -> float:
    """Processor time a process has used so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def parked(spares: int, seconds: float) -> None:
    """Print what spares cost that only wait."""
    with HpcftRun(1, spares, ["--params", "1e6"]) as run:
        run.more_steps(50)
        time.sleep(5)  # the spares try out their steps first
        table = json.loads((run.path / "run" / "ranks.json").read_text())["ranks"]
        waiting = [entry["pid"] for entry in table if entry["role"] == "spare"]
        shepherds = [shepherd for pid in waiting if (shepherd := shepherd_of(pid))]
        parties = {"rank": waiting, "shepherd": shepherds}
        before = {pid: cpu_seconds(pid) for pids in parties.values() for pid in pids}
        time.sleep(seconds)
        for name, pids in parties.items():
            shares = [100 * (cpu_seconds(pid) - before[pid]) / seconds for pid in pids]
            print(f"{name} of a spare: {', '.join(f'{s:.2f}' for s in shares)} % of a core")


def adoption(ranks: int, params: float, evaluate: bool, rng: random.Random) -> tuple[float, float]:
    """Kill a rank of a run with one spare.

    Returns
    -------
    From the kill to the end of the next step, and an undisturbed step's length; in seconds.
    """
    arguments = ["--params", str(params)]
    options = ["--ckpt-dir", "{path}/saved", "--ckpt-every", "20"]
    if evaluate:
        arguments += ["--evaluate", "{path}/evaluating"]
        options += ["--spares-do", "evaluate"]
    with HpcftRun(ranks, 1, arguments, *options) as run:
        run.more_steps(30)
        if evaluate:
            run.wait_for("an evaluation", (run.path / "evaluating").exists)
        else:
            time.sleep(5)  # the spare tries out its steps first
        there = len(run.stamps())
        run.more_steps(_STEPS)
        step = step_time(run.stamps()[there:])
        time.sleep(rng.uniform(0, 2 * step))
        killed = time.time()
        os.kill(rng.choice(run.ranks())["pid"], signal.SIGKILL)
        run.wait_for("recovery", lambda: run.events("recovered"))
        return run.events("recovered")[0]["time"] - killed, step


def adoptions(count: int, ranks: int, params: float, rng: random.Random) -> None:
    """Print what it costs to adopt a spare that evaluates."""
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(count):
        for evaluate, ones in found.items():
            ones.append(adoption(ranks, params, evaluate, rng))
    print(
        "| the spare | adoption, median | worst | undisturbed step | kills |\n|---|---|---|---|---|"
    )
    for evaluate, ones in found.items():
        totals, steps = zip(*ones, strict=True)
        print(
            f"| {'evaluates' if evaluate else 'waits'} | {1000 * median(totals):.1f} "
            f"| {1000 * max(totals):.1f} | {1000 * median(steps):.1f} | {len(ones)} |"
        )


@contextmanager
def slowed(disk: Disk) -> Iterator[None]:
    """Have it answer only now and then."""
    over = threading.Event()

    def slow() -> None:
        while not over.wait(_THAWED):
            disk.freeze()
            over.wait(_FROZEN)
            disk.thaw()

    thread = threading.Thread(target=slow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def standstill(ranks: int, params: float, seconds: float) -> None:
    """Print what checkpoints cost training that the ranks write, and a spare."""
    near = ["--ckpt-near", "2s:{path}"]
    saves = [*near, "--ckpt-memory", "16M", "--ckpt-keep", "1", "--ckpt-dir"]
    ways = {
        "nobody": [*saves, "{path}/saved", "--ckpt-every", "1000h"],
        "the ranks": [*saves, "{disk}/ranks", "--ckpt-every", "10s"],
        "a spare": [*saves, "{disk}/spare", "--ckpt-every", "10s", "--spares-do", "drain"],
    }
    print(
        "| who writes checkpoints | stands still, s | longest step, s | median step, ms | steps "
        "| checkpoints | by the spare |\n|---|---|---|---|---|---|---|"
    )
    for who, options in ways.items():
        with tempfile.TemporaryDirectory() as folder, mounted(Path(folder)) as disk:
            options = [word.replace("{disk}", str(disk.path)) for word in options]
            with HpcftRun(ranks, 1, ["--params", str(params), "--pace", "0.05"], *options) as run:
                run.more_steps(_STEPS)
                time.sleep(5)  # the spare tries out its steps first
                with slowed(disk):
                    there, saved = len(run.stamps()), len(run.events("checkpoint"))
                    time.sleep(seconds)
                    stamps = run.stamps()[there:]
                    events = run.events("checkpoint")[saved:]
            lengths = [after.time - before.time for before, after in pairwise(stamps)]
            usual = median(lengths)
            lost = sum(max(0.0, length - 2 * usual) for length in lengths)
            by_spare = sum("world" in event["detail"] for event in events)
            print(
                f"| {who} | {lost:.2f} | {max(lengths):.2f} | {1000 * usual:.0f} | {len(lengths)} "
                f"| {len(events)} | {by_spare} |",
                flush=True,
            )


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30, help="how long (default 30)")
    parser.add_argument("--adoptions", type=int, default=0, metavar="N")
    parser.add_argument("--standstill", action="store_true")
    parser.add_argument("--ranks", type=int, default=2, help="that train (default 2)")
    parser.add_argument("--params", type=float, default=10e6, help="of the model (default 1e7)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(machine())
    if args.adoptions:
        adoptions(args.adoptions, args.ranks, args.params, random.Random(args.seed))
    elif args.standstill:
        standstill(args.ranks, args.params, args.seconds)
    else:
        parked(args.spares, args.seconds)


if __name__ == "__main__":
    main()
