"""A training that meets its time limit again and again, and must not be changed by that.

``python tests/fault/requeues.py --times 10`` has Slurm, in the lab, warn a job a minute before
its end, time after time; each time the job saves, is requeued and goes on by itself. At the end its
parameters have to be those of an undisturbed run, bit for bit. A round takes about a minute.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

from batch import Job, training
from cluster import Cluster
from training import PROGRAM, Training, wait_for

#: Steps a second, and so at most in a minute: what a round can do has to be less than this.
_PACE = 0.2
_STEPS_A_ROUND = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=10, metavar="N", help="requeues (default 10)")
    args = parser.parse_args()
    steps = _STEPS_A_ROUND * (args.times + 1)
    cluster = Cluster()
    was_up = cluster.is_up()
    cluster.up()
    try:
        with tempfile.TemporaryDirectory(prefix="hpcft-test-", dir="/var/tmp") as folder:
            return judge(*carry_out(cluster, Path(folder), args.times, steps))
    finally:
        if not was_up:
            cluster.down()


def carry_out(
    cluster: Cluster, folder: Path, times: int, steps: int
) -> tuple[list[dict[str, Any]], str]:
    """The summaries of all rounds, and what the parameters should be."""
    until = folder / "hurry"
    options = ("--nodes", "3", "--spares", "1", "--ranks-per-node", "1")
    # Slurm looks twice a minute, and warns half a minute early: after 20 to 50 s.
    limits = ("--time", "2:00", "--signal", "70")
    program = ("--steps", str(steps), "--pace", str(_PACE), "--until", str(until))
    script = training(cluster, folder, *program, options=(*options, *limits))
    job = Job.submit(cluster, folder, str(script))
    for restart in range(1, times + 1):
        wait_for(f"restart {restart}", lambda n=restart: restarted(job, n), 240)
        print(f"restart {restart}: {job.shown().get('Comment', '')}", flush=True)
    until.touch()
    job.wait_for_state("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", seconds=240)
    print(job.shown().get("Comment", ""))
    alone = Training(folder / "alone", ["--nproc", "2"], [str(PROGRAM), *program])
    return job.summaries(), alone.start().finish()["params_sha256"]


def restarted(job: Job, times: int) -> bool:
    return int(job.shown()["Restarts"]) >= times and job.output.count("restored from") >= times


def judge(summaries: list[dict[str, Any]], expected: str) -> int:
    """Say what has become of it; return the exit code."""
    last = 0
    for number, summary in enumerate(summaries):
        began, ended = summary["restored_step"] or 0, summary["steps"]
        print(f"run {number}: {summary['result']}, steps {began} to {ended}: {summary['reason']}")
        if began != last or summary["restarts"] != number:
            print(f"  it should have begun at step {last}, as restart {number}")
            return 1
        last = ended
    same = summaries[-1]["params_sha256"] == expected
    print(f"{last} steps, {len(summaries) - 1} requeues; the final parameters are", end=" ")
    print("those of an undisturbed run" if same else "OTHERS than those of an undisturbed run")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
