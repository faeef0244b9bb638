"""A training in an allocation that loses a node and all other ranks at once, and is relaunched."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from training import Training, undisturbed, wait_for

pytestmark = pytest.mark.slurm


def test_what_a_node_and_all_ranks_take_with_them_is_started_again_on_the_others(
    cluster: Cluster, srun: Callable[..., Training], shared_path: Path
) -> None:
    options = ["--ckpt-dir", str(shared_path / "checkpoints"), "--ckpt-every", "1000"]
    program = ["--pace", "0.05", "--steps", "60"]
    run = srun(4, 1, 1, *options, "--ckpt-near", "5", program=program)
    run.wait_for_step(16)
    ranks = run.ranks()
    cluster.kill_node("n3")
    for entry in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry["pid"], signal.SIGKILL)
    # With the spare's shepherd there are still three.
    wait_for("the summary", (run.run_dir / "summary.json").exists, 60)
    cluster.write_off("n3")
    summary = run.finish()
    assert summary["result"] == "ok"
    assert summary["steps"] == 60
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 0}
    assert [relaunch["step"] >= 16 for relaunch in summary["relaunches"]] == [True]
    [relaunch] = [event for event in run.events() if event["kind"] == "relaunch"]
    assert relaunch["detail"]["hosts"] == ["n1", "n2", "n4"]
    assert summary["params_sha256"] == undisturbed(3)[60]
    # From memory: nothing had been saved elsewhere.
    assert summary["restored_step"] >= 5
    assert "on the nodes" in run.output
