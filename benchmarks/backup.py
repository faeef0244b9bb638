"""Backup workers: throughput and loss with slow ranks, side by side with plain synchronous steps.

python benchmarks/backup.py slow    one of 5 ranks takes 10 times as long for a third of its steps
python benchmarks/backup.py tail    6 ranks whose times have a heavy tail: time to a loss by b, the
                                    shape of Chen et al. 2016, figure 5; also as backup.svg
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import machine
from straggling import data, model

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    rate: steps a second, from the fifth on.
    losses: step -> validation loss.
    times: step -> seconds since the first step's end.
    """

    rate: float
    losses: dict[int, float]
    times: dict[int, float]

    def reached(self, loss: float) -> int | None:
        """The first step known to have had no more validation loss than that."""
        return next((step for step, found in self.losses.items() if found <= loss), None)


def run(ranks: int, backup: int, params: float, arguments: list[str]) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="hpcft-backup-", dir="/dev/shm"))
    command = [sys.executable, "-m", "hpcft.run", "--run-dir", str(folder / "run"), "--no-digest"]
    command += ["--nproc", str(ranks), *(["--backup", str(backup)] if backup else [])]
    command += [str(HERE / "straggling.py"), "--out", str(folder), "--params", str(params)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        subprocess.run([*command, *arguments], check=True, env=environ, capture_output=True)
        stamps = [line.split() for line in (folder / "stamps").read_text().splitlines()]
        moments = {int(step): float(time) for step, time in stamps}
        files = sorted(folder.glob("*.pt"), key=lambda file: int(file.stem))
        losses = {int(file.stem): validate(torch.load(file), params) for file in files}
    finally:
        shutil.rmtree(folder)
    begin = min(moments.values())
    warm = [step for step in moments if step >= 5]
    rate = (warm[-1] - warm[0]) / (moments[warm[-1]] - moments[warm[0]])
    return Outcome(rate, losses, {step: time - begin for step, time in moments.items()})


@torch.no_grad()
def validate(parameters: dict[str, torch.Tensor], params: float) -> float:
    net = model(int(params))
    net.load_state_dict(parameters)
    net.eval()
    _, held_out = data()
    texts, following = (torch.stack(column) for column in zip(*held_out, strict=True))
    return float(F.cross_entropy(net(texts).flatten(0, 1), following.flatten()))


def slow(args: argparse.Namespace) -> None:
    steps = args.steps
    plain = run(5, 0, args.params, ["--steps", str(steps)])
    rows = [("sync, no rank slow", plain)]
    for backup in (0, 1):
        name = f"--backup {backup}" if backup else "sync"
        # A tenth more, to see when it comes to the same loss.
        arguments = ["--steps", str(steps + (steps // 10 if backup else 0)), "--pace=slow"]
        rows.append((f"{name}, one slow", run(5, backup, args.params, arguments)))
    target = plain.losses[max(plain.losses)]
    print(f"| | steps/s | of undisturbed | validation loss after {steps} | steps to {target:.4f} |")
    print("|---|---|---|---|---|")
    for name, outcome in rows:
        there = max(step for step in outcome.losses if step <= steps)
        reached = outcome.reached(target) or f"> {max(outcome.losses)}"
        share = f"{outcome.rate / plain.rate:.0%}"
        print(
            f"| {name} | {outcome.rate:.2f} | {share} | {outcome.losses[there]:.4f} | {reached} |"
        )


def tail(args: argparse.Namespace) -> None:
    arguments = ["--steps", str(args.steps), "--pace=tail", f"--exponent={args.exponent}"]
    outcomes = [run(6, backup, args.params, arguments) for backup in range(4)]
    # A loss that all of them have come to.
    target = max(min(outcome.losses.values()) for outcome in outcomes)
    points = []
    print(f"validation loss {target:.3f}")
    print("| b | steps/s | steps to it | seconds to it |")
    print("|---|---|---|---|")
    for backup, outcome in enumerate(outcomes):
        steps = outcome.reached(target)
        assert steps is not None
        points.append((backup, outcome.times[steps]))
        print(f"| {backup} | {outcome.rate:.2f} | {steps} | {points[-1][1]:.1f} |")
    draw(points, args.plot)


def draw(points: list[tuple[int, float]], path: Path) -> None:
    """A bar for each b, as SVG."""
    most = max(seconds for _, seconds in points)
    parts = []
    for backup, seconds in points:
        x, height = 60 + backup * 90, 200 * seconds / most
        parts.append(f'<rect x="{x}" y="{240 - height:.0f}" width="50" height="{height:.0f}"/>')
        parts.append(f'<text x="{x}" y="{232 - height:.0f}">{seconds:.0f} s</text>')
        parts.append(f'<text x="{x}" y="260">b = {backup}</text>')
    frame = '<svg xmlns="http://www.w3.org/2000/svg" width="440" height="280" fill="#357">'
    path.write_text(frame + "".join(parts) + "</svg>\n")
    print(f"drawn to {path}")


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("slow", "tail"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--params", type=float, default=5e4)
    parser.add_argument("--exponent", type=float, default=1.5, help="of the tail (default 1.5)")
    parser.add_argument("--plot", type=Path, default=Path("backup.svg"))
    args = parser.parse_args()
    print(machine())
    {"slow": slow, "tail": tail}[args.what](args)


if __name__ == "__main__":
    main()
