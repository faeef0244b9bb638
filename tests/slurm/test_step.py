"""Trainings under plain srun that lose ranks and nodes, on a real Slurm cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cluster import CONTROLLER, SRUN, Cluster
from training import HERE, PROGRAM, Training, kill_at_start, undisturbed, wait_for

pytestmark = pytest.mark.slurm

Srun = Callable[..., Training]


def adopted(run: Training) -> bool:
    return any(event["kind"] == "resume" for event in run.events())


def ended(run: Training, cluster: Cluster, *lost: str) -> None:
    """Training is over; with these nodes lost srun can end as soon as Slurm knows."""
    wait_for("the summary", (run.run_dir / "summary.json").exists)
    for node in lost:
        cluster.write_off(node)


def test_the_lab_is_four_hosts(cluster: Cluster) -> None:
    done = cluster.run("srun", "-N4", "hostname")
    assert sorted(done.stdout.split()) == cluster.nodes
    done = cluster.run("hostname")
    assert done.stdout.strip() == CONTROLLER


@pytest.mark.parametrize(("nodes", "per_node"), [(4, 1), (2, 4)])
def test_a_clean_run_ends_with_zero(srun: Srun, nodes: int, per_node: int) -> None:
    run = srun(nodes, per_node, 1, program=["--steps", "10"])
    summary = run.finish()
    assert summary["result"] == "ok"
    assert summary["world"]["initial"] == nodes * per_node - 1
    assert "error" not in run.output
    numbers = sorted(re.findall(r"^local (\d+) of (\d+)$", run.logs(), re.M))
    assert numbers == sorted((str(i), str(per_node)) for i in range(per_node) for _ in range(nodes))


@pytest.mark.parametrize(("nodes", "per_node"), [(4, 1), (2, 2)])
def test_a_killed_rank(srun: Srun, nodes: int, per_node: int) -> None:
    run = srun(nodes, per_node, 1)
    run.wait_for_step(15)
    run.send(1)
    summary = run.finish()
    assert summary["failures"][0]["cause"] == "killed by SIGKILL"
    assert summary["params_sha256"] == undisturbed(3)[60]


def test_a_lost_node_whose_loss_slurm_notices_by_itself(cluster: Cluster, srun: Srun) -> None:
    run = srun(4, 1, 1)
    run.wait_for_step(15)
    cluster.kill_node("n1")
    summary = run.finish()
    assert [f["cause"] for f in summary["failures"]] == ["node n1 lost"]
    assert summary["params_sha256"] == undisturbed(3)[60]


@pytest.mark.parametrize(("nodes", "per_node"), [(4, 1), (3, 2)])
def test_a_lost_node_is_lost_as_a_whole(
    cluster: Cluster, srun: Srun, nodes: int, per_node: int
) -> None:
    run = srun(nodes, per_node, per_node)
    run.wait_for_step(15)
    cluster.kill_node("n2")
    ended(run, cluster, "n2")
    summary = run.finish()
    assert len(summary["failures"]) == per_node
    assert {f["cause"] for f in summary["failures"]} == {"node n2 lost"}
    # All its ranks in one recovery.
    assert [e["kind"] for e in run.events()].count("resume") == 1
    assert summary["params_sha256"] == undisturbed((nodes - 1) * per_node)[60]


def test_two_nodes_at_once(cluster: Cluster, srun: Srun) -> None:
    run = srun(4, 1, 1)
    run.wait_for_step(15)
    cluster.kill_node("n2")
    cluster.kill_node("n3")
    ended(run, cluster, "n2", "n3")
    summary = run.finish()
    assert sorted(f["ranks"] for f in summary["failures"]) == [[1], [2]]
    assert summary["world"] == {"initial": 3, "final": 2, "spares_left": 0}
    assert summary["steps"] == 60


def test_a_cut_link_that_heals_changes_nothing(cluster: Cluster, srun: Srun) -> None:
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


def test_a_frozen_node_that_thaws_changes_nothing(cluster: Cluster, srun: Srun) -> None:
    run = srun(4, 1, 1)
    run.wait_for_step(15)
    pid = run.entry(1)["pid"]
    cluster.freeze("n2")
    wait_for("recovery", lambda: adopted(run))
    cluster.thaw("n2")
    wait_for("the fenced rank's end", lambda: _state(pid) == "gone")
    summary = run.finish()
    assert [f["ranks"] for f in summary["failures"]] == [[1]]
    assert summary["params_sha256"] == undisturbed(3)[60]


def test_a_stopped_rank_cannot_be_continued(srun: Srun) -> None:
    run = srun(2, 2, 1)
    run.wait_for_step(15)
    pid = run.entry(2)["pid"]
    run.send(2, signal.SIGSTOP)
    wait_for("recovery", lambda: adopted(run))
    # It may be on its way out, at the kernel's leisure.
    with suppress(psutil.NoSuchProcess, ProcessLookupError):
        assert psutil.Process(pid).status() != psutil.STATUS_STOPPED
        os.kill(pid, signal.SIGCONT)
    assert run.finish()["params_sha256"] == undisturbed(3)[60]


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
    # So that srun reaches all whom it is to end.
    cluster.heal("n3")


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


def test_a_node_that_comes_too_late_to_a_failed_start_does_not_keep_the_step(
    cluster: Cluster, shared_path: Path
) -> None:
    kill_at_start(shared_path, 2)
    environ = {**cluster.environ(), "PYTHONPATH": str(shared_path)}
    slurmd = cluster.slurmd("n4")
    os.kill(slurmd, signal.SIGSTOP)
    run = Training(
        shared_path / "run", [], prefix=cluster.command([*SRUN, "-N4"]), environ=environ
    ).start()
    wait_for("the others to leave", lambda: run.output.count("Exited with exit code") == 3)
    os.kill(slurmd, signal.SIGCONT)
    assert run.process.wait(60) != 0


def test_nobody_leaves_a_fence_that_somebody_has_not_come_to(
    cluster: Cluster, shared_path: Path
) -> None:
    program = [sys.executable, str(HERE / "programs" / "fence.py"), str(shared_path)]
    done = cluster.run(*SRUN, "-N4", *program)
    assert done.stdout.splitlines() == ["come 4"] * 20, done.stderr


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
    state = cluster.batch(
        "--nodes=2",
        f"--chdir={shared_path}",
        f"--export=ALL,PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
        str(HERE.parent / "slurm" / "train.sbatch"),
        str(PROGRAM),
        *("--steps", "20"),
    )
    out = "\n".join(file.read_text() for file in shared_path.glob("*.out"))
    assert state == "COMPLETED", out
    [summary] = shared_path.glob("hpcft-runs/*/summary.json")
    assert '"result": "ok"' in summary.read_text()


def test_spares_as_the_record_of_the_nodes_has_it(cluster: Cluster) -> None:
    hpcft = [sys.executable, "-m", "hpcft.cli.main", "sbatch", "--nodes", "4", "--time", "60"]
    done = cluster.run(*hpcft, "--spares", "auto", str(PROGRAM))
    assert done.returncode == 0, done.stderr
    # Nothing is worth a quarter of all nodes but nodes that fail all the time.
    assert "# 4 ranks, 0 of them spares: a node fails once in " in done.stdout
    assert "--spares 0 " in done.stdout


def test_a_job_of_one_node_needs_no_srun(cluster: Cluster, shared_path: Path) -> None:
    script = shared_path / "job"
    script.write_text('#!/bin/sh\nexec "$@"\n')
    out, run = shared_path / "job.out", shared_path / "run"
    command = [sys.executable, "-m", "hpcft.run", "--run-dir", str(run)]
    command += ["--nproc", "2", "--spares", "1", str(PROGRAM), "--suicide", "5:1"]
    state = cluster.batch("-N1", f"--output={out}", str(script), *command)
    assert state == "COMPLETED", out.read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert [f["ranks"] for f in summary["failures"]] == [[1]]
    assert summary["params_sha256"] == undisturbed(2)[60]


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


def test_a_step_is_seen_and_ended_from_outside(cluster: Cluster, srun: Srun) -> None:
    run = srun(2, 1, 0, program=["--steps", "100000"])
    run.wait_for_step(5)

    def hpcft(*words: str) -> str:
        done = cluster.run(sys.executable, "-m", "hpcft.cli.main", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    step = cluster.run("squeue", "--steps", "--noheader", "--format=%i").stdout.split()
    (name,) = [number for number in step if number.endswith(".0")]
    view = json.loads(hpcft("ps", "--json"))
    assert (view["name"], view["job"], view["state"]) == (name, name.split(".")[0], "training")
    assert view["hosts"] == ["n1", "n2"]
    # By the number of its job, from a host that no rank is on, which so cannot see what they do.
    ended = json.loads(hpcft("stop", name.split(".")[0], "--json"))
    assert ended["ended"]
    assert {rank["state"] for rank in view["ranks"]} == {""}
    assert run.process.wait(60) != 0
    assert cluster.run("squeue", "--steps", "--noheader").stdout == ""
    # Killed as a whole, it cannot tell; but Slurm can.
    run.start()
    wait_for("the new run", lambda: '"training"' in hpcft("ps", "--json"))
    cluster.run("scancel", "--signal=KILL", json.loads(hpcft("ps", "--json"))["name"])
    run.process.wait(60)
    assert hpcft("ps", "--json") == ""
    assert json.loads(hpcft("ps", str(run.run_dir), "--json"))["state"] == "killed"
