"""What `hpcft plan` predicts of runs on this machine, beside what they then do.

    python benchmarks/planner.py                          all configurations, about 25 minutes
    python benchmarks/planner.py --only relaunch --seconds 40 --seed 3

For each number of ranks, with checkpoints near them or without, a run is calibrated by: it loses
ranks in each of the ways there are, and `hpcft plan --from` takes the times that it has measured.
Then each configuration is run, and loses ranks by `hpcft chaos` at a rate that is known beforehand,
when and which is drawn from --seed. Of that the planner gets the rate (column *predicted*, with
where 9 of 10 runs are to lie), or the failures as they came (`hpcft plan --trace`, column
*traced*), where luck plays no part. With the times that the run itself has measured, in place of
the calibration's, what is left is due to the planner alone (column *own times*).

Each share is that of the time from the first step on, for no failure comes before. Whether a
failure just misses a checkpoint or not is worth the steps between two, so these are few. On a
machine that has something else to do times differ by more than all of this.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from peers import machine

HERE = Path(__file__).parent
_DAY = 86400.0
#: Seconds a start may take, and an end.
_PATIENCE = 300.0


@dataclass(frozen=True)
class Configuration:
    """What is run.

    least: fewer ranks do not go on, all are started again.
    every: steps from one file to the next; ``near`` the same near the ranks, 0 for none.
    rate: failures a minute, of those that train and of spares.
    """

    name: str
    ranks: int
    spares: int
    least: int = 1
    every: int = 100
    near: int = 0
    rate: float = 4.0

    @property
    def processes(self) -> int:
        return self.ranks + self.spares


CONFIGURATIONS = (
    Configuration("spares 3+2", 3, 2),
    Configuration("spares 2+2", 2, 2, rate=5),
    Configuration("spare, then shrink 3+1", 3, 1),
    Configuration("shrink 4+0", 4, 0, rate=2),
    Configuration("relaunch 3+0, file 20", 3, 0, 3, every=20),
    Configuration("relaunch 3+0, file 40", 3, 0, 3, every=40, rate=3),
    Configuration("relaunch 3+0, near 10", 3, 0, 3, every=200, near=10),
    Configuration("relaunch 2+0, file 20", 2, 0, 2, every=20, rate=3),
    Configuration("spare, then relaunch 4+1", 4, 1, 4, every=20),
    Configuration("spare, then relaunch 2+1", 2, 1, 2, every=20, rate=6),
    Configuration("spares, shrink, relaunch 4+2", 4, 2, 3, every=20, rate=6),
)


@dataclass(frozen=True)
class Known:
    """What the run by which others are planned has told.

    run: its directory.
    step: seconds of one.
    end: seconds that ending takes.
    save: seconds for which a checkpoint holds training up.
    """

    run: Path
    step: float
    end: float
    save: float


@dataclass(frozen=True)
class Row:
    """The shares of a configuration, in parts of 1.

    between: of 9 of 10 runs, as predicted.
    traced, own: as predicted of the failures as they came, by a calibration and by its own times.
    """

    name: str
    failures: int
    measured: float
    predicted: float
    between: tuple[float, float]
    traced: float
    own: float


def hpcft(*words: str) -> str:
    """What a command prints; its exit code is not looked at, which may be a verdict."""
    command = [sys.executable, "-m", "hpcft.cli.main", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(f"hpcft {' '.join(words)}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def training(run: Path, one: Configuration) -> Iterator[subprocess.Popen[bytes]]:
    """A run that has made its first steps; it is killed if it has not been stopped."""
    command = [sys.executable, "-m", "hpcft.run", "--run-dir", str(run), "--no-digest"]
    command += ["--nproc", str(one.ranks), "--spares", str(one.spares)]
    command += ["--min-ranks", str(one.least), "--max-relaunch", "1000"]
    command += ["--ckpt-dir", f"{run}.ckpt", "--ckpt-every", str(one.every)]
    command += ["--ckpt-near", str(one.near)] if one.near else []
    command += [str(HERE / "workload.py"), "--stamps", f"{run}.stamps"]
    command += ["--params", "1e5", "--pace", "0.05"]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with Path(f"{run}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
        try:
            deadline = time.monotonic() + _PATIENCE
            while not _step(run):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{one.name}: no step was made, see {run}.log")
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(30)
            process.kill()
            process.wait()


def _step(run: Path) -> int:
    try:
        return int(json.loads((run / "status.json").read_text())["step"] or 0)
    except (OSError, ValueError):
        return 0


def _trains(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until steps are made: what is not yet restored cannot be told from what is lost."""
    deadline, seen = time.monotonic() + _PATIENCE, {_step(run)}
    while len(seen) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
        seen.add(_step(run))


def harmed(run: Path, one: Configuration, faults: str, seconds: float) -> dict[str, Any]:
    """Have it trained and harmed for so long from its first step on, stopped, and reported."""
    schedule = Path(f"{run}.faults")
    schedule.write_text(faults)
    with training(run, one) as process:
        until = time.monotonic() + seconds
        command = [sys.executable, "-m", "hpcft.cli.main", "chaos", str(run), "--json"]
        chaos = subprocess.Popen(
            [*command, "--schedule", str(schedule)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(max(0.0, until - time.monotonic()))
        _trains(run, process)
        hpcft("stop", str(run), "--json", "--timeout", f"{_PATIENCE:g}")
        process.wait(_PATIENCE)
        chaos.wait(_PATIENCE)
    told: dict[str, Any] = json.loads(hpcft("report", str(run), "--json"))
    return told


def known(run: Path, one: Configuration, told: dict[str, Any]) -> Known:
    """What a run of a configuration that has been reported tells."""
    parts, steps = told["goodput"], told["step"]
    step = (parts["steps"] + parts["waiting"]) / steps
    # Those that were done again were saved as well.
    done = steps + parts["again"] / step
    saves = done / one.every + (done / one.near if one.near else 0)
    return Known(run, step, parts["ending"], parts["saving"] / saves)


def calibrate(folder: Path, ranks: int, near: bool) -> Known:
    """By a run of so many ranks. It loses one to a spare, one more, and one too many; thrice."""
    name = f"calibration-{ranks}{'-near' * near}"
    one = Configuration(name, ranks, 1, max(1, ranks - 1), 20, 10 if near else 0)
    run = folder / name
    kills = [4 + 6 * number for number in range(3 * (2 + ranks - one.least))]
    faults = "\n".join(f"{at}s kill" for at in kills)
    return known(run, one, harmed(run, one, faults, kills[-1] + 8))


def faults_of(one: Configuration, seconds: float, chance: random.Random) -> str:
    """When, and to whom; as `hpcft chaos` reads it.

    There are as many as the rate makes in the mean, for of few their number is most of the luck.
    """
    lines = []
    for _ in range(round(one.rate * seconds / 60)):
        spare = chance.random() * one.processes >= one.ranks
        lines.append((chance.uniform(0, seconds), "kill spare" if spare else "kill"))
    return "\n".join(f"{at:.3f}s {what}" for at, what in sorted(lines))


def planned(one: Configuration, by: Known, *words: str) -> dict[str, Any]:
    """What the planner says of a configuration."""
    said = {
        "--from": by.run,
        "--nodes": one.ranks,
        "--spares": one.spares,
        "--ranks-per-node": 1,
        "--min-nodes": one.least,
        "--ckpt-every": one.every * by.step,
        "--ckpt-cost": by.save,
        "--near-cost": by.save,
        "--near-survives": one.ranks,
        # Processes die here, not machines: when all are started again all are there.
        "--soft": 1,
        "--reboot": 0,
    }
    if one.near:
        said["--near-every"] = one.near * by.step
    options = [str(word) for pair in said.items() for word in pair]
    told: dict[str, Any] = json.loads(hpcft("plan", *options, "--no-rejoin", "--json", *words))
    return told


def share(goodput: dict[str, float]) -> float:
    """Of steps that count, from the first step on."""
    return goodput["steps"] / (goodput["whole"] - goodput["starting"])


def compare(
    folder: Path, one: Configuration, by: Known, seconds: float, seed: int, runs: int
) -> Row:
    run = folder / one.name.replace(" ", "-").replace(",", "")
    faults = faults_of(one, seconds, random.Random(f"{seed} {one.name}"))
    days = (seconds + by.end) / _DAY
    between = 60 * one.processes / one.rate
    lives = ["--runs", str(runs), "--seed", str(seed)]
    # First said, then seen.
    predicted = planned(
        one, by, "--days", str(days), "--mtbf-node", str(between), "--start", "0", *lives
    )
    told = harmed(run, one, faults, seconds)
    # It is from the first step on that the failures came.
    words = ["--trace", str(run), "--start", str(told["goodput"]["starting"]), "--runs", "2"]
    traced, own = (
        share(planned(one, times, *words)["goodput"]) for times in (by, known(run, one, told))
    )
    hit = sum(incident["kind"] == "failure" for incident in told["incidents"])
    low, high = predicted["between"]
    part = share(predicted["goodput"])
    return Row(one.name, hit, share(told["goodput"]), part, (low, high), traced, own)


def _apart(name: str, differences: list[float]) -> str:
    worst = max(differences, key=abs)
    mean = fmean(abs(one) for one in differences)
    return f"{name}: worst {100 * worst:+.1f} points, mean {100 * mean:.1f}"


def _line(row: Row) -> str:
    low, high = row.between
    cells = [row.name, str(row.failures), f"{100 * row.measured:.1f} %"]
    for found in (row.predicted, row.traced, row.own):
        cells += [f"{100 * found:.1f} %", f"{100 * (found - row.measured):+.1f}"]
    cells[3] += f" ({100 * low:.0f} to {100 * high:.0f})"
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="configurations whose name has this in it")
    parser.add_argument("--seconds", type=float, default=80, help="of each, from its first step")
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    parser.add_argument("--runs", type=int, default=400, help="lives the planner plays through")
    parser.add_argument("--keep", action="store_true", help="leave the runs' directories")
    args = parser.parse_args()
    chosen = [one for one in CONFIGURATIONS if args.only in one.name]
    if not chosen:
        raise SystemExit(f"no configuration has {args.only!r} in its name")
    folder = Path(tempfile.mkdtemp(prefix="hpcft-planner-", dir="/dev/shm"))
    # The user's own list of runs is left alone.
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    try:
        print(f"{machine()}; {args.seconds:g} s each, seed {args.seed}\n")
        names = ("predicted", "traced", "own times")
        head = " | ".join(f"{name} | apart" for name in names)
        print(f"| configuration | failures | measured | {head} |\n|{'---|' * 9}", flush=True)
        calibrated: dict[tuple[int, bool], Known] = {}
        rows = []
        for one in chosen:
            kind = one.ranks, one.near > 0
            if kind not in calibrated:
                calibrated[kind] = calibrate(folder, *kind)
            by = calibrated[kind]
            rows.append(compare(folder, one, by, args.seconds, args.seed, args.runs))
            print(_line(rows[-1]), flush=True)
        print()
        for name, of in zip(names, ("predicted", "traced", "own"), strict=True):
            print(_apart(name, [getattr(row, of) - row.measured for row in rows]))
        within = sum(row.between[0] <= row.measured <= row.between[1] for row in rows)
        print(f"measured where 9 of 10 were predicted to be: {within} of {len(rows)}")
    finally:
        if args.keep:
            print(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
