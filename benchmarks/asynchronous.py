"""What the modes cost and spare: the same training sync, as local SGD, and asynchronously.

Three figures of each mode, in one run of this script:

* a rank of four is killed, with no spare: how many steps the other three make in the second after
  it, in per cent of what they made in the second before;
* the same with a spare: how long the longest step of one of the others takes, beyond the median,
  while the spare joins;
* the loss on text that none has seen, after equally many samples of examples/train_lm.py, which is
  the same script for all.

A step of the first two waits 20 ms for its data (--pace), so that four ranks leave two processors
some room; otherwise who is left would be quicker for having them to themselves.

    python benchmarks/asynchronous.py                            all of it
    python benchmarks/asynchronous.py --kills 5 --steps 0        failures alone
    python benchmarks/asynchronous.py --kills 0 --steps 400      the loss alone
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import h5py
import torch
import torch.nn.functional as F
from peers import HERE, HpcftRun, Stamp, machine

sys.path.insert(0, str(HERE.parent / "examples"))

import train_lm

MODES = ("sync", "local-sgd", "async")
RANKS = 4
#: Characters that are trained on, and those after them that are not.
TRAINED, UNSEEN = 500_000, 100_000


@dataclass(frozen=True)
class Loss:
    """One kill.

    kept: steps that the others made in the second after it, by those in the second before.
    pause: the longest step of one of the others in that second, beyond the median, in seconds.
    """

    kept: float
    pause: float


def lose_one(mode: str, spares: int, params: float, pace: float) -> Loss:
    """Train, kill one of four, and see what the others do."""
    arguments = ["--params", str(params), "--pace", str(pace), "--everybody"]
    with HpcftRun(RANKS, spares, arguments, "--mode", mode) as run:
        run.more_steps(RANKS * 40)
        victim = run.ranks()[2]["pid"]
        others = {entry["pid"] for entry in run.ranks()} - {victim}
        time.sleep(1.2)
        killed = time.time()
        os.kill(victim, signal.SIGKILL)
        time.sleep(1.5)
        stamps = [stamp for stamp in run.stamps() if stamp.pid in others]
    before = sum(killed - 1 <= stamp.time < killed for stamp in stamps)
    after = sum(killed <= stamp.time < killed + 1 for stamp in stamps)
    return Loss(after / before, _pause(stamps, killed))


def _pause(stamps: list[Stamp], killed: float) -> float:
    by_rank: dict[int, list[float]] = defaultdict(list)
    for stamp in stamps:
        by_rank[stamp.pid].append(stamp.time)
    pauses = []
    for times in by_rank.values():
        steps = [(b, b - a) for a, b in itertools.pairwise(times)]
        usual = median(length for _, length in steps)
        pauses.append(max(length - usual for end, length in steps if killed <= end < killed + 1.5))
    return max(pauses)


def unseen_loss(mode: str, steps: int) -> float:
    """Train the example in one mode, and return its loss on text that is new to it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        command = [sys.executable, "-m", "hpcft.run", "--run-dir", f"{folder}/run"]
        command += ["--nproc", str(RANKS), "--mode", mode, "--ckpt-dir", f"{folder}/saved"]
        command += [train_lm.__file__, "--steps", str(steps), "--text", str(TRAINED)]
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, capture_output=True, env=environ)
        state = max(Path(folder).glob("saved/*/state.h5"))
        model = train_lm.LanguageModel(train_lm.width_for(200_000)).eval()
        with h5py.File(state) as file:
            model.load_state_dict(
                {name: torch.tensor(file["model"][name][()]) for name in model.state_dict()}
            )
    text = train_lm.standard_library(TRAINED + 2 * UNSEEN)
    # The example's last module is trained on as a whole, however long.
    start = len(train_lm.standard_library(TRAINED))
    passages = train_lm.Passages(train_lm.encode(text[start : start + UNSEEN]))
    losses = []
    with torch.no_grad():
        for first in range(0, len(passages), 64):
            some = [passages[i] for i in range(first, min(first + 64, len(passages)))]
            inputs, targets = (torch.stack(side) for side in zip(*some, strict=True))
            losses.append(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item())
    return sum(losses) / len(losses)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--params", type=float, default=200e3, help="with --kills (default 200k)")
    parser.add_argument("--pace", type=float, default=0.02, help="seconds (default 0.02)")
    parser.add_argument("--steps", type=int, default=300, help="of the example (default 300)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; {RANKS} ranks, medians of {args.kills} kills, {args.steps} steps")
    print("| mode | kept after a loss | longest pause as a spare joins | loss on unseen text |")
    print("|---|---|---|---|")
    kept: dict[str, list[Loss]] = defaultdict(list)
    joined: dict[str, list[Loss]] = defaultdict(list)
    # In turns, so that a change of the machine's mood hits all.
    for _, mode in itertools.product(range(args.kills), args.modes):
        kept[mode].append(lose_one(mode, 0, args.params, args.pace))
        joined[mode].append(lose_one(mode, 1, args.params, args.pace))
    for mode in args.modes:
        row = [mode]
        if args.kills:
            shares = sorted(100 * loss.kept for loss in kept[mode])
            pauses = sorted(1000 * loss.pause for loss in joined[mode])
            row.append(f"{median(shares):.0f} % ({shares[0]:.0f} to {shares[-1]:.0f})")
            row.append(f"{median(pauses):.0f} ms ({pauses[0]:.0f} to {pauses[-1]:.0f})")
        else:
            row += ["", ""]
        row.append(f"{unseen_loss(mode, args.steps):.3f}" if args.steps else "")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
