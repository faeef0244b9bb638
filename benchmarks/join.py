"""How long training stops when a rank joins: with hpcft, and with torchrun's elastic agents.

From the last step of the ranks before to the first of all with the new one. hpcft's ranks go on
from what they have left in memory, at the step they were at. torchrun's second agent, with one
worker, comes to a first with three, which then restarts all from their checkpoint of the last step,
in memory too; agents look after each other every 100 ms.

    python benchmarks/join.py                 1 rank to 3, 1 M parameters, 5 times each, in turns
    python benchmarks/join.py --times 10
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
from statistics import median

from peers import HERE, HpcftRun, Run, machine


def _pause(run: Run, before: set[int]) -> tuple[float, int]:
    """Seconds between the last step of the processes ``before`` and the next, and steps lost."""

    def first() -> float:
        return next((s.time for s in run.stamps() if s.pid not in before), 0.0)

    run.wait_for("a step after it", first)
    stamps = run.stamps()
    last = max((s for s in stamps if s.pid in before), key=lambda s: s.time)
    after = min((s for s in stamps if s.pid not in before), key=lambda s: s.time)
    # The step at whose end all have left was done, and not noted.
    return after.time - last.time, max(0, last.step + 1 - after.step)


def hpcft(args: argparse.Namespace) -> tuple[float, int]:
    """The pause, and the steps lost, when ``hpcft join`` is called."""
    folder = tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/dev/shm")
    options = ["--ckpt-dir", folder, "--ckpt-every", "100000"]
    workload = ["--params", str(args.params)]
    try:
        with HpcftRun(f"{args.ranks}:{args.ranks + 1}", 0, workload, *options) as run:
            run.more_steps(12)
            before = {stamp.pid for stamp in run.stamps()}
            command = [sys.executable, "-m", "hpcft.cli.main", "join", str(run.path / "run")]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as joined:
                try:
                    return _pause(run, before)
                finally:
                    joined.terminate()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torchrun(args: argparse.Namespace) -> tuple[float, int]:
    """The same when another agent comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def agent(workers: int) -> list[str]:
        return [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "1"),
            # What it waits for others when enough are there; the default is 30 s.
            *("--rdzv-conf", "last_call_timeout=1", "--local-addr", "127.0.0.1"),
            *("--nproc-per-node", str(workers), "--max-restarts", "1000"),
            *("--monitor-interval", "0.1"),
        ]

    workload = ["--params", str(args.params), "--save-every", "1"]
    workload += ["--checkpoint", "{path}/checkpoint"]
    with Run(agent(args.ranks), workload) as run:
        run.more_steps(12)
        before = {stamp.pid for stamp in run.stamps()}
        words = [word.replace("{path}", str(run.path)) for word in workload]
        script = [str(HERE / "workload.py"), "--stamps", str(run.path / "stamps"), *words]
        with subprocess.Popen([*agent(1), *script], stderr=subprocess.DEVNULL) as other:
            try:
                return _pause(run, before)
            finally:
                other.terminate()


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=3, help="before the other joins")
    parser.add_argument("--params", type=float, default=1e6)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    found: dict[str, list[tuple[float, int]]] = {"hpcft": [], "torchrun": []}
    for _ in range(args.times):
        found["hpcft"].append(hpcft(args))
        found["torchrun"].append(torchrun(args))
    print(f"{machine()}; 1 rank to {args.ranks}, {args.params / 1e6:g} M parameters; seconds\n")
    print("| | median pause | each | steps lost | ratio |\n|---|---|---|---|---|")
    ours = median(seconds for seconds, _ in found["hpcft"])
    for name, results in found.items():
        middle = median(seconds for seconds, _ in results)
        each = ", ".join(f"{seconds:.2f}" for seconds, _ in results)
        lost = ", ".join(str(steps) for _, steps in results)
        print(f"| {name} | {middle:.2f} | {each} | {lost} | {middle / ours:.1f} |")


if __name__ == "__main__":
    main()
