"""See a training lose a rank and not mind: ``make demo``.

Trains the digits on 4 ranks with 1 spare twice, once left alone and once with a rank killed
half-way by SIGKILL, and compares the final parameters.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 400
VICTIM = 2


def start(run_dir: Path) -> subprocess.Popen[bytes]:
    example = Path(__file__).with_name("train_digits.py")
    command = [sys.executable, "-m", "hpcft.run", "--nproc", "4", "--spares", "1"]
    command += ["--run-dir", str(run_dir), str(example), "--steps", str(STEPS)]
    print("$", " ".join(["python", *command[1:]]), flush=True)
    # One thread a rank: this demo is to run on small machines.
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_ranks(run: subprocess.Popen[bytes], run_dir: Path) -> dict[str, Any]:
    while not (run_dir / "ranks.json").exists():
        if run.poll() is not None:
            sys.exit("the training did not start; see the messages above")
        time.sleep(0.05)
    table: dict[str, Any] = json.loads((run_dir / "ranks.json").read_text())
    return table


def end(run: subprocess.Popen[bytes], run_dir: Path) -> dict[str, Any]:
    if run.wait() != 0:
        sys.exit(f"the training ended with exit code {run.returncode}; its logs are in {run_dir}")
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def main() -> None:
    place = Path(tempfile.mkdtemp(prefix="hpcft-demo-"))
    try:
        print("First, a run in which nothing happens:")
        calm_dir = place / "calm"
        calm = end(start(calm_dir), calm_dir)

        print("\nNow the same again, and half-way a rank is killed:")
        run_dir = place / "killed"
        run = start(run_dir)
        table = wait_for_ranks(run, run_dir)
        time.sleep(calm["seconds"] / 2)
        pid = next(entry["pid"] for entry in table["ranks"] if entry["logical"] == VICTIM)
        print(f"$ kill -9 {pid}    # rank {VICTIM}", flush=True)
        os.kill(pid, signal.SIGKILL)
        killed = end(run, run_dir)
    finally:
        shutil.rmtree(place, ignore_errors=True)

    if not killed["failures"]:
        sys.exit("the run was over before the rank was killed; this machine is too fast for STEPS")
    failure = killed["failures"][0]
    print("\nWhat happened:")
    print(f"  Rank {failure['ranks'][0]} was {failure['cause']} after step {failure['step']}.")
    print(f"  The others knew {1000 * failure['detect_s']:.0f} ms later. They agreed on who was")
    print("  left, the spare took the dead rank's number and its part of the data, got the")
    print(f"  parameters from a survivor ({1000 * failure['recover_s']:.0f} ms for all of it), and")
    print(f"  the next step was done {1000 * failure['stall_s']:.0f} ms after the kill.")
    print(f"  Steps lost: {failure['lost_steps']}.")
    same = calm["params_sha256"] == killed["params_sha256"]
    print(f"  The final parameters are {'the same, bit for bit' if same else 'DIFFERENT'}:")
    print(f"    left alone  {calm['params_sha256']}")
    print(f"    rank killed {killed['params_sha256']}")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
