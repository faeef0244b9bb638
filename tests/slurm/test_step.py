"""Trainings under plain srun that lose ranks and nodes, on a real Slurm cluster."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import CONTROLLER, SRUN, Cluster
from training import HERE, Training, kill_at_start, wait_for

pytestmark = pytest.mark.slurm

Srun = Callable[..., Training]

#: Digests of undisturbed runs, by number of active ranks; made on first use.
_undisturbed: dict[int, str] = {}


@pytest.fixture
def undisturbed(srun: Srun) -> Callable[[int], str]:
    def digest(active: int) -> str:
        if active not in _undisturbed:
            summary = srun(1, active, 0).finish()
            assert summary["failures"] == []
            _undisturbed[active] = summary["params_sha256"]
        return _undisturbed[active]

    return digest


def adopted(run: Training) -> bool:
    return any(event["kind"] == "resume" for event in run.events())


def test_the_lab_is_four_hosts(cluster: Cluster) -> None:
    done = cluster.run("srun", "-N4", "hostname")
    assert sorted(done.stdout.split()) == cluster.nodes
    done = cluster.run("hostname")
    assert done.stdout.strip() == CONTROLLER


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_a_clean_run_ends_with_zero(srun: Srun, per_node: int) -> None:
    run = srun(4, per_node, 1, program=["--steps", "10"])
    summary = run.finish()
    assert summary["result"] == "ok"
    assert summary["world"]["initial"] == 4 * per_node - 1
    assert "error" not in run.output


@pytest.mark.parametrize("per_node", [1, 2])
def test_a_killed_rank(srun: Srun, undisturbed: Callable[[int], str], per_node: int) -> None:
    run = srun(4, per_node, 1)
    run.wait_for_step(15)
    run.send(1)
    summary = run.finish()
    assert summary["failures"][0]["cause"] == "killed by SIGKILL"
    assert summary["params_sha256"] == undisturbed(4 * per_node - 1)


@pytest.mark.parametrize(("per_node", "victim"), [(1, "n1"), (1, "n2"), (2, "n2")])
def test_a_lost_node_is_lost_as_a_whole(
    cluster: Cluster,
    srun: Srun,
    undisturbed: Callable[[int], str],
    per_node: int,
    victim: str,
) -> None:
    run = srun(4, per_node, per_node)
    run.wait_for_step(15)
    cluster.kill_node(victim)
    summary = run.finish()
    assert len(summary["failures"]) == per_node
    assert {f["cause"] for f in summary["failures"]} == {f"node {victim} lost"}
    # All its ranks in one recovery.
    assert [e["kind"] for e in run.events()].count("resume") == 1
    assert summary["params_sha256"] == undisturbed(3 * per_node)


def test_two_nodes_at_once(cluster: Cluster, srun: Srun) -> None:
    run = srun(4, 1, 1)
    run.wait_for_step(15)
    cluster.kill_node("n2")
    cluster.kill_node("n3")
    summary = run.finish()
    assert sorted(f["ranks"] for f in summary["failures"]) == [[1], [2]]
    assert summary["world"] == {"initial": 3, "final": 2, "spares_left": 0}
    assert summary["steps"] == 60


def test_a_cut_link_that_heals_changes_nothing(
    cluster: Cluster, srun: Srun, undisturbed: Callable[[int], str]
) -> None:
    run = srun(4, 1, 1, program=["--steps", "300"])
    run.wait_for_step(15)
    pid = run.entry(1)["pid"]
    cluster.cut("n2")
    wait_for("recovery", lambda: adopted(run))
    # Cut off, the rank was stopped before the others went on.
    assert _state(pid) in ("T", "gone")
    cluster.heal("n2")
    wait_for("the fenced rank's end", lambda: _state(pid) == "gone")
    summary = run.finish()
    assert [f["ranks"] for f in summary["failures"]] == [[1]]
    assert "silent" in summary["failures"][0]["cause"]
    assert summary["steps"] == 300


def test_a_frozen_node_that_thaws_changes_nothing(
    cluster: Cluster, srun: Srun, undisturbed: Callable[[int], str]
) -> None:
    run = srun(4, 1, 1)
    run.wait_for_step(15)
    pid = run.entry(1)["pid"]
    cluster.freeze("n2")
    wait_for("recovery", lambda: adopted(run))
    cluster.thaw("n2")
    wait_for("the fenced rank's end", lambda: _state(pid) == "gone")
    summary = run.finish()
    assert [f["ranks"] for f in summary["failures"]] == [[1]]
    assert summary["params_sha256"] == undisturbed(3)


def test_a_stopped_rank_cannot_be_continued(srun: Srun, undisturbed: Callable[[int], str]) -> None:
    run = srun(2, 2, 1)
    run.wait_for_step(15)
    pid = run.entry(2)["pid"]
    run.send(2, signal.SIGSTOP)
    wait_for("recovery", lambda: adopted(run))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert run.finish()["params_sha256"] == undisturbed(3)


def test_a_minority_does_not_continue(cluster: Cluster, srun: Srun) -> None:
    run = srun(3, 1, 0, program=["--steps", "100000"])
    run.wait_for_step(15)
    lonely = run.entry(2)
    assert lonely["host"] == "n3"
    cluster.cut("n3")
    wait_for("recovery", lambda: adopted(run))
    log = run.run_dir / "logs" / f"rank-{lonely['world']}.log"
    before = log.stat().st_size
    time.sleep(1.5)
    assert log.stat().st_size == before
    assert len(run.ranks()) == 2


def test_srun_without_pmix_is_told(cluster: Cluster, shared_path: Path, srun: Srun) -> None:
    run = Training(
        shared_path / "run", [], prefix=cluster.command(["srun", "-n2"]), environ=cluster.environ()
    ).start()
    assert run.process.wait(60) == 2
    assert "--mpi=pmix" in run.output


def test_more_spares_than_ranks_is_told(srun: Srun) -> None:
    run = srun(2, 1, 2)
    assert run.process.wait(60) == 2
    assert "leaves no rank to train with" in run.output


def test_a_rank_that_dies_while_starting_ends_the_step(cluster: Cluster, shared_path: Path) -> None:
    kill_at_start(shared_path, 2)
    environ = {**cluster.environ(), "PYTHONPATH": str(shared_path)}
    run = Training(
        shared_path / "run", [], prefix=cluster.command([*SRUN, "-N4"]), environ=environ
    ).start()
    assert run.process.wait(60) != 0
    assert "hpcft: rank 2 ended while starting: killed by SIGKILL" in run.output


def test_no_mpi_on_the_nodes_is_told_once(cluster: Cluster, shared_path: Path) -> None:
    broken = shared_path / "mpi4py" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text("raise ImportError('libmpi.so.40: no such file')")
    environ = {**cluster.environ(), "PYTHONPATH": str(shared_path)}
    run = Training(
        shared_path / "run", [], prefix=cluster.command([*SRUN, "-N4"]), environ=environ
    ).start()
    assert run.process.wait(60) == 2
    assert run.output.count("libmpi.so.40: no such file; `hpcft doctor`") == 1


def test_srun_that_is_cancelled_leaves_nothing(cluster: Cluster, srun: Srun) -> None:
    before = {node: len(cluster.processes(node)) for node in cluster.nodes}
    run = srun(4, 1, 1, program=["--steps", "100000"])
    run.wait_for_step(5)
    run.process.terminate()
    assert run.process.wait(30) != 0
    wait_for(
        "all processes to end",
        lambda: {node: len(cluster.processes(node)) for node in cluster.nodes} == before,
    )


def test_the_sbatch_template(cluster: Cluster, shared_path: Path) -> None:
    template = HERE.parent / "slurm" / "train.sbatch"
    program = HERE / "programs" / "train.py"
    done = cluster.run(
        "sbatch",
        "--wait",
        f"--chdir={shared_path}",
        f"--export=ALL,PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
        str(template),
        str(program),
        "--steps",
        "20",
        timeout=120,
    )
    out = "\n".join(file.read_text() for file in shared_path.glob("*.out"))
    assert done.returncode == 0, done.stderr + out
    [summary] = shared_path.glob("hpcft-runs/*/summary.json")
    assert '"result": "ok"' in summary.read_text()


def test_a_job_of_one_node_needs_no_srun(
    cluster: Cluster, shared_path: Path, undisturbed: Callable[[int], str]
) -> None:
    script = shared_path / "job"
    script.write_text('#!/bin/sh\nexec "$@"\n')
    sbatch = ["sbatch", "--wait", "-N1", f"--output={shared_path}/job.out", str(script)]
    run = Training(
        shared_path / "run",
        ["--nproc", "2", "--spares", "1"],
        prefix=cluster.command(sbatch),
        environ=cluster.environ(),
    ).start()
    run.wait_for_step(5)
    run.send(1)
    assert run.finish()["params_sha256"] == undisturbed(2)


def test_outside_its_allocation_srun_is_asked_for(cluster: Cluster, shared_path: Path) -> None:
    run = Training(
        shared_path / "run",
        [],
        prefix=cluster.command(["salloc", "-N1"]),
        environ=cluster.environ(),
    ).start()
    assert run.process.wait(60) == 2
    assert "put srun in front" in run.output


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
