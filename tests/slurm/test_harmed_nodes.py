"""`hpcft chaos` on nodes other than its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from training import Training, undisturbed, wait_for

pytestmark = pytest.mark.slurm

Srun = Callable[..., Training]

#: Seconds for which silence is borne. What is sent again for the third time is late by 1.4.
_DETECT = "3"
#: That of node n2 is replaced for the cut, and that of n1, which is the first rank, when its node
#: dies.
_SCHEDULE = """
    0s lossy host=n2 for=3s percent=5
    5s cut host=n2 for=6s
    15s node host=n1
    """


def test_links_and_nodes(cluster: Cluster, srun: Srun, shared_path: Path) -> None:
    harmed, file = shared_path / "harmed", shared_path / "faults"
    file.write_text(_SCHEDULE)
    paced = ["--steps", "144", "--pace", "0.5", "--until", str(harmed)]
    run = srun(4, 1, 2, "--timeout-detect", _DETECT, program=paced)
    run.wait_for_step(5)
    wait_for("status.json", lambda: (run.run_dir / "status.json").exists())
    hpcft = [sys.executable, "-m", "hpcft.cli.main", "chaos", str(run.run_dir)]
    done = cluster.run(
        *(*hpcft, "--schedule", str(file), "--expect", "recover", "--settle", "60s", "--json"),
        timeout=180,
    )
    found = json.loads(done.stdout)
    answers = [(one["who"], one["answer"]) for one in found["findings"]]
    assert [answer for _, answer in answers] == ["went on", "substitute", "substitute"], found
    assert found["passed"], found["reasons"]
    assert not list(run.run_dir.glob("chaos/*"))
    for node in cluster.nodes:
        assert not cluster.run("srun", f"-w{node}", "--overlap", "nft", "list", "tables").stdout
    harmed.touch()
    # Of a shepherd's death srun tells by its exit code.
    summary = run.finish(code=137)
    assert [failure["ranks"] for failure in summary["failures"]] == [[1], [0]]
    assert summary["params_sha256"] == undisturbed(2)[144]
