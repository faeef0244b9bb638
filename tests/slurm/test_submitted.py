"""Trainings as jobs of submitit, on a real Slurm cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import submitit
from cluster import Cluster
from jobs import training
from training import STORIES, tails, wait_for

import hpcft.submitit

pytestmark = pytest.mark.slurm


@pytest.fixture
def executor(
    cluster: Cluster, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[submitit.AutoExecutor]:
    for name, value in {**cluster.environ(), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    executor = submitit.AutoExecutor(folder=shared_path / "jobs", cluster="slurm")
    executor.update_parameters(timeout_min=10, **hpcft.submitit.allocation(nodes=3))
    folder = shared_path / "jobs"
    STORIES.append(lambda: cluster.run("scontrol", "show", "jobs").stdout)
    STORIES.append(lambda: "\n".join(tails(*folder.glob("*.*"), *folder.glob("*/*.jsonl"))))
    yield executor
    cluster.run("scancel", "--full", "--signal=KILL", "--user=root")


def test_a_function_outlives_a_preemption_and_a_node(
    executor: submitit.AutoExecutor, cluster: Cluster, shared_path: Path
) -> None:
    until = shared_path / "until"
    of_two = hpcft.submitit.Job(training(), nproc=2, spares=1, options=["--ckpt-every", "20"])
    job = executor.submit(of_two, str(until))
    run, saved = (shared_path / "jobs" / f"{job.job_id}_{w}" for w in ("run", "checkpoints"))
    wait_for("a checkpoint", lambda: list(saved.glob("step-*")), 180)
    job._interrupt()

    def state() -> str:
        return cluster.run("squeue", "--noheader", "--format=%T", "--jobs", job.job_id).stdout

    wait_for("the requeue", lambda: "PENDING" in state())
    # Slurm lets such a job wait for two minutes. Within the second of its end nodes refuse it.
    cluster.run("scontrol", "update", f"JobId={job.job_id}", "StartTime=now+3")

    def restored() -> bool:
        log = run / "events.jsonl"
        return log.exists() and "restore" in log.read_text()

    wait_for("the requeued run", restored, 180)
    ranks = json.loads((run / "ranks.json").read_text())["ranks"]
    host = next(rank["host"] for rank in ranks if rank["logical"] == 1)
    # submitit's own process is on the first.
    assert [rank["host"] for rank in ranks] == ["n1", "n2", "n3"]
    cluster.kill_node(host)
    wait_for("the recovery", lambda: "recovered" in (run / "events.jsonl").read_text())
    done = cluster.run(sys.executable, "-m", "hpcft.cli.main", "ps", job.job_id, "--json")
    assert json.loads(done.stdout)["failures"][0]["cause"] == f"node {host} lost"
    until.touch()
    wait_for("the summary", (run / "summary.json").exists)
    cluster.write_off(host)
    result = job.result()
    assert (result["rank"], result["size"]) == (0, 2)
    assert result["begun_at"][1] >= 20
    assert result["steps"] > result["begun_at"][1]
