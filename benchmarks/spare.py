"""What a parked spare costs: processor time of its rank and of its shepherd, in percent of a core.

python benchmarks/spare.py --spares 2 --seconds 30
"""

from __future__ import annotations

import argparse
import json
import time

import psutil
from peers import HpcftRun, machine


def cpu_seconds(pid: int) -> float:
    """Processor time a process has used so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30, help="how long (default 30)")
    args = parser.parse_args()
    print(machine())
    with HpcftRun(1, args.spares, ["--params", "1e6"]) as run:
        run.more_steps(50)
        time.sleep(5)  # the spares try out their steps first
        table = json.loads((run.path / "run" / "ranks.json").read_text())["ranks"]
        spares = [entry["pid"] for entry in table if entry["role"] == "spare"]
        parties = {"rank": spares, "shepherd": [psutil.Process(pid).ppid() for pid in spares]}
        before = {pid: cpu_seconds(pid) for pids in parties.values() for pid in pids}
        time.sleep(args.seconds)
        for name, pids in parties.items():
            shares = [100 * (cpu_seconds(pid) - before[pid]) / args.seconds for pid in pids]
            print(f"{name} of a spare: {', '.join(f'{s:.2f}' for s in shares)} % of a core")


if __name__ == "__main__":
    main()
