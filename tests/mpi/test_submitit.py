"""Trainings as jobs of submitit, on this machine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import submitit
from jobs import training
from training import PROGRAM, wait_for

import hpcft.submitit
from hpcft.errors import UsageError

pytestmark = pytest.mark.mpi


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> submitit.AutoExecutor:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5, **hpcft.submitit.allocation(nodes=1))
    return executor


def content(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def test_a_function_heals_is_requeued_and_returns(
    executor: submitit.AutoExecutor, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    training_of_two = hpcft.submitit.Job(
        training(), nproc=2, spares=1, options=["--ckpt-every", "20"]
    )
    job = executor.submit(training_of_two, str(until))
    run, saved = (tmp_path / "jobs" / f"{job.job_id}_{what}" for what in ("run", "checkpoints"))
    wait_for("a checkpoint", lambda: list(saved.glob("step-*")))
    # What submitit does to it when its time is nearly over.
    [task] = psutil.Process(int(job.job_id)).children()
    before = psutil.Process(content(run / "ranks.json")["ranks"][0]["pid"])
    task.send_signal(signal.SIGUSR2)
    wait_for("its end", lambda: not before.is_running())

    def second() -> dict[str, Any] | None:
        ranks = content(run / "ranks.json").get("ranks", [])
        fresh = ranks and ranks[0]["pid"] != before.pid and content(run / "status.json").get("step")
        return next(rank for rank in ranks if rank["logical"] == 1) if fresh else None

    victim = wait_for("the requeued run", second)
    os.kill(victim["pid"], signal.SIGKILL)
    wait_for("the recovery", lambda: "recovered" in (run / "events.jsonl").read_text())
    until.touch()
    result = job.result()
    assert (result["rank"], result["size"]) == (0, 2)
    # From its checkpoint, and not from the beginning.
    assert result["begun_at"][0] == 0
    assert result["steps"] > result["begun_at"][-1] >= result["begun_at"][1] >= 20
    assert result["weight"].shape == (1, 4)
    summary = content(run / "summary.json")
    assert summary["restored_step"] == result["begun_at"][1]
    assert [failure["ranks"] for failure in summary["failures"]] == [[1]]


def test_what_a_function_raises_comes_back_and_a_script_has_a_summary(
    executor: submitit.AutoExecutor, tmp_path: Path
) -> None:
    failing = hpcft.submitit.Job(training(), nproc=1)
    job = executor.submit(failing, str(tmp_path / "until"), raises=True)
    said = str(job.exception())
    assert 'raise ValueError("this function is wrong")' in said
    assert "exit code 1" in said
    script = hpcft.submitit.Job(PROGRAM, nproc=1)
    assert executor.submit(script, "--steps", 3).result()["steps"] == 3


def test_a_job_is_for_an_executor() -> None:
    with pytest.raises(UsageError, match=r"hpcft.submitit.Job was called"):
        hpcft.submitit.Job(training(), nproc=1)("nowhere")


def test_srun_gets_the_ranks_on_all_nodes_whatever_step_submitit_is() -> None:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_STEP_ID": "0",
        "SLURM_SRUN_COMM_HOST": "10.0.0.1",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CONF": "/etc/slurm.conf",
        "PMIX_RANK": "0",
        "HOME": "/root",
    }
    assert hpcft.submitit.starter(7, environ)[-3:] == [
        "--nodes=4",
        "--ntasks=7",
        "--ntasks-per-node=2",
    ]
    assert hpcft.submitit.starter(3, {**environ, "SLURM_JOB_NUM_NODES": "1"}) == []
    assert set(hpcft.submitit.without_step(environ)) == {
        "SLURM_JOB_ID",
        "SLURM_JOB_NUM_NODES",
        "SLURM_CONF",
        "HOME",
    }
