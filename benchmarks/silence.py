"""How long a training under srun stands still for each kind of failure, at default settings.

On the Slurm lab of the tests (four nodes in network namespaces; needs root on Debian): a rank
killed, a rank stopped, a node killed, a node frozen, a link cut. Three ranks train, one is a spare,
each on a node of its own.

    python benchmarks/silence.py --runs 5
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from peers import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slurm"))

from cluster import SRUN, Cluster, missing
from training import PROGRAM, Training, wait_for


def once(cluster: Cluster, harm: Callable[[Training], None]) -> dict[str, Any]:
    """One run, harmed; returns the failure as the summary has it."""
    # The nodes have a /tmp of their own.
    path = Path(tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/var/tmp"))
    run = Training(
        path / "run",
        ["--spares", "1"],
        [str(PROGRAM), "--steps", "100000"],
        cluster.command([*SRUN, "-N4"]),
        cluster.environ(),
    ).start()
    try:
        run.wait_for_step(20)
        harm(run)
        events = wait_for("recovery", lambda: [e for e in run.events() if e["kind"] == "recovered"])
        [failure] = [e for e in run.events() if e["kind"] == "failure"]
        resume = next(e for e in run.events() if e["kind"] == "resume")
        return {
            "detect": failure["detail"]["detect_s"],
            "recover": resume["detail"]["recover_s"],
            "stall": events[0]["detail"]["stall_s"],
        }
    finally:
        run.stop()
        cluster.revive()
        shutil.rmtree(path, ignore_errors=True)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="runs of each kind (default 3)")
    args = parser.parse_args()
    if reason := missing():
        raise SystemExit(f"the Slurm lab {reason}")
    cluster = Cluster()
    cluster.up()

    def victim(run: Training) -> int:
        return int(run.entry(1)["pid"])

    harms: dict[str, Callable[[Training], None]] = {
        "rank killed": lambda run: os.kill(victim(run), signal.SIGKILL),
        "rank stopped": lambda run: os.kill(victim(run), signal.SIGSTOP),
        "node killed": lambda run: cluster.kill_node("n2"),
        "node frozen": lambda run: cluster.freeze("n2"),
        "link cut": lambda run: cluster.cut("n2"),
    }
    print(f"{machine()}; medians of {args.runs} runs, in ms\n")
    print("| what happens | detect | recover | until the next step is done | worst |")
    print("|---|---|---|---|---|")
    try:
        for name, harm in harms.items():
            found = [once(cluster, harm) for _ in range(args.runs)]
            detect, recover, stall = (
                f"{1000 * median(one[key] for one in found):.0f}"
                for key in ("detect", "recover", "stall")
            )
            worst = 1000 * max(one["stall"] for one in found)
            print(f"| {name} | {detect} | {recover} | {stall} | {worst:.0f} |", flush=True)
    finally:
        cluster.down()


if __name__ == "__main__":
    main()
