"""What --balance makes of ranks that differ in speed: steps a second with it and without.

Computing is played by sleeping, for each sample so long; the ranks of one half take so many times
as long for it as the others. Best is what the shares would come to by arithmetic, were there
nothing else to do in a step.

    python benchmarks/balance.py                          4 ranks, half of them twice as slow
    python benchmarks/balance.py --factor 1.3 --times 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def train(args: argparse.Namespace) -> None:
    """What the ranks run: rank 0 says how long the last half of the steps took each."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, TensorDataset

    import hpcft

    torch.set_num_threads(1)
    job = hpcft.init()
    data = TensorDataset(torch.randn(1 << 14, 32))
    model = DistributedDataParallel(nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sampler = hpcft.ElasticBatchSampler(len(data), batch_size=args.batch)
    loader = DataLoader(data, batch_sampler=sampler)
    state = hpcft.State(model=model, optimizer=optimizer, sampler=sampler)
    seconds = args.ms / 1000 * (args.factor if job.rank % 2 else 1)
    stamps: list[float] = []

    def loop(state: hpcft.State) -> None:
        while state.step < args.steps:
            for (inputs,) in loader:
                time.sleep(seconds * len(inputs))
                loss = model(inputs).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state.commit()
                stamps.append(time.monotonic())
                if state.step >= args.steps:
                    break

    job.run(loop, state)
    if job.rank == 0:
        half = stamps[len(stamps) // 2 :]
        print(json.dumps({"step_s": (half[-1] - half[0]) / (len(half) - 1)}))


def measure(args: argparse.Namespace, balance: bool) -> float:
    """Seconds that a step takes."""
    folder = Path(tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/dev/shm"))
    command = [sys.executable, "-m", "hpcft.run", "--nproc", str(args.ranks), "--verbose", "0"]
    command += ["--run-dir", str(folder / "run"), "--no-digest", *["--balance"] * balance]
    command += [__file__, "--worker", "--steps", str(args.steps), "--batch", str(args.batch)]
    command += ["--ms", str(args.ms), "--factor", str(args.factor)]
    try:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        said = subprocess.run(command, env=environ, check=True, capture_output=True, text=True)
        return float(json.loads(said.stdout.splitlines()[-1])["step_s"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--factor", type=float, default=2.0, help="how much slower odd ranks are")
    parser.add_argument("--batch", type=int, default=32, help="samples a rank")
    parser.add_argument("--ms", type=float, default=1.0, help="milliseconds for a sample")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--times", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train(args)
        return
    even, shared = [], []
    for _ in range(args.times):
        even.append(measure(args, balance=False))
        shared.append(measure(args, balance=True))
        print(f"a step takes {1000 * even[-1]:.1f} ms, with --balance {1000 * shared[-1]:.1f} ms")
    slow = args.ranks // 2
    rate = (args.ranks - slow) + slow / args.factor
    print(
        f"{args.ranks} ranks, {slow} of them {args.factor:g} times as slow: "
        f"{median(even) / median(shared):.2f} times as fast with --balance; "
        f"best would be {args.factor * rate / args.ranks:.2f}"
    )


if __name__ == "__main__":
    main()
