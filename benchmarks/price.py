"""What hpcft costs when nothing fails: its step time against plain DDP with gloo.

Both sides train the same model with the same ranks and threads, in turns within one run of this
script, so that a change of the machine's mood hits both. The step time is rank 0's, the median of
a turn's steps; the ratio is the median of those of the turns.

    python benchmarks/price.py --ranks 2 --params 10e6
"""

from __future__ import annotations

import argparse
from statistics import median

from peers import HpcftRun, Run, TorchrunRun, machine, step_time


def turn(run: Run, steps: int, warm: int) -> float:
    """Median step time of one turn, in seconds."""
    with run:
        run.more_steps(warm + steps)
        return step_time(run.stamps()[warm:])


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--params", type=float, default=10e6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="steps a turn (default 60)")
    parser.add_argument("--turns", type=int, default=9, help="turns a side (default 9)")
    args = parser.parse_args()
    print(f"{machine()}; {args.ranks} ranks, {args.params / 1e6:g} M, batch {args.batch}")
    workload = ["--params", str(args.params), "--batch", str(args.batch)]
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(args.turns):
        ours.append(turn(HpcftRun(args.ranks, 0, workload), args.steps, 10))
        theirs.append(turn(TorchrunRun(args.ranks, workload), args.steps, 10))
        print(f"turn {number}: hpcft {1000 * ours[-1]:.2f} ms, gloo {1000 * theirs[-1]:.2f} ms")
    # Pairs of turns, one right after the other, see the same machine.
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"median: hpcft {1000 * median(ours):.2f} ms, gloo {1000 * median(theirs):.2f} ms: "
        f"ratio {ratio:.3f}"
    )


if __name__ == "__main__":
    main()
