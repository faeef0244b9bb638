"""Nodes that join a training under way, and leave it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import SRUN, Cluster
from training import PROGRAM, Training, kill_all, launched, wait_for

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


def test_nodes_of_another_job_join_and_outlive_the_first(
    cluster: Cluster, shared_path: Path
) -> None:
    run = Training(
        shared_path / "run",
        ["--nproc", "2:3", "--ckpt-dir", str(shared_path / "checkpoints"), "--ckpt-near", "1"],
        [str(PROGRAM), "--steps", "100000", "--pace", "0.1"],
        cluster.command([*SRUN, "-N2", "-wn1,n2", "--exclusive"]),
        cluster.environ(),
    ).start()
    run.wait_for_step(3)
    refused = cluster.run(*HPCFT, "join", str(run.run_dir), "--nodes", "n3")
    assert refused.returncode == 2
    assert "n3 does not belong to job" in refused.stderr
    with (shared_path / "joined.out").open("wb") as out:
        join = ["-N2", "-wn3,n4", "--exclusive", *HPCFT, "join", str(run.run_dir)]
        joined = cluster.start("salloc", *join, stdout=out, stderr=out)
    wait_for("n3 and n4", lambda: hosts(run) == set(cluster.nodes))
    assert [entry["role"] for entry in run.ranks()] == ["active"] * 3 + ["spare"]
    run.wait_for_step(run.step() + 5)
    # In place, as ever: the spare takes over.
    cluster.kill_node("n2")
    wait_for("the others to train", lambda: hosts(run) == {"n1", "n3", "n4"})
    run.wait_for_step(run.step() + 5)
    # All ranks are lost: those that are left are launched across both jobs once more.
    kill_all(run)
    launched(run, 3)
    run.wait_for_step(run.step() + 5)
    assert hosts(run) == {"n1", "n3", "n4"}
    left = cluster.run(*HPCFT, "leave", str(run.run_dir), "--nodes", "n1")
    assert (left.returncode, left.stdout) == (0, "1 left; 2 processes go on\n"), left.stderr
    assert run.process.wait(60) == 0
    before = run.step()
    wait_for("some steps", lambda: run.step() > before + 5)
    assert hosts(run) == {"n3", "n4"}
    # The end of the job that is left is that of the run, in order.
    door = json.loads((run.run_dir / "door.json").read_text())
    cluster.run("scancel", door["peers"][0]["job"])
    wait_for("the end", (run.run_dir / "summary.json").exists)
    summary = run.summary()
    assert (summary["result"], summary["steps"] > before) == ("interrupted", True), run.output
    reasons = [resize["reason"] for resize in summary["resizes"]]
    assert reasons == ["n3 and n4 join", "n1 leaves"]
    assert len(summary["relaunches"]) == 1
    joined.wait(60)
