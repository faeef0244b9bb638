"""Nodes that join a training under way, and leave it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cluster import SRUN, Cluster
from training import PROGRAM, Training, wait_for

pytestmark = pytest.mark.slurm

HPCFT = [sys.executable, "-m", "hpcft.cli.main"]


def hosts(run: Training) -> set[str]:
    return {entry["host"] for entry in run.ranks()}


def test_nodes_join_leave_and_are_drained(
    cluster: Cluster, allocation: str, shared_path: Path
) -> None:
    words = [*SRUN, "--overlap", f"--jobid={allocation}", "-N3", "-wn1,n2,n3"]
    run = Training(
        shared_path / "run",
        ["--nproc", "2:4", "--spares", "1", "--ckpt-dir", str(shared_path / "checkpoints")],
        [str(PROGRAM), "--steps", "100000", "--pace", "0.1"],
        cluster.command(words),
        cluster.environ(),
    ).start()
    run.wait_for_step(3)
    # What that leads to takes half a minute, for Slurm is not to be asked all the time.
    cluster.run("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=lab")
    joined = cluster.start(*HPCFT, "join", str(run.run_dir), stdout=subprocess.PIPE)
    wait_for("n4", lambda: "n4" in hosts(run))
    before = run.step()
    # Rank 0 and with it the one who decides so far.
    left = cluster.run(*HPCFT, "leave", str(run.run_dir), "--nodes", "n1")
    assert (left.returncode, left.stdout) == (0, "1 left; 3 processes go on\n"), left.stderr
    wait_for("n1 to be left", lambda: "n1" not in hosts(run))
    wait_for("n3 to be left", lambda: "n3" not in hosts(run), 60)
    run.wait_for_step(before + 10)
    refused = cluster.run(*HPCFT, "leave", str(run.run_dir), "--nodes", "n4")
    assert refused.returncode == 2
    assert "1 processes would be left, of at least 2" in refused.stderr
    assert hosts(run) == {"n2", "n4"}

    assert cluster.run(*HPCFT, "stop", str(run.run_dir)).returncode == 0
    summary = run.summary()
    assert summary["result"] == "interrupted"
    reasons = [resize["reason"] for resize in summary["resizes"]]
    assert reasons == ["n4 joins", "n1 leaves", "n3 leaves"]
    assert summary["failures"] == []
    assert summary["world"]["final"] == 2
    joined.wait(30)
    run.process.wait(30)
