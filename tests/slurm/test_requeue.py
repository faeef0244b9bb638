"""Jobs that Slurm warns, preempts and ends, and that go on by themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from batch import Job, training
from cluster import Cluster
from training import HERE, PROGRAM, undisturbed, wait_for

pytestmark = pytest.mark.slurm

TEMPLATES = HERE.parent / "slurm"


def test_a_job_that_is_warned_goes_on_by_itself_without_the_node_it_has_lost(
    cluster: Cluster, shared_path: Path
) -> None:
    options = ("--nodes", "3", "--ranks-per-node", "1", "--spares", "1", "--time", "30:00")
    script = training(cluster, shared_path, "--steps", "96", "--pace", "0.1", options=options)
    subprocess.run(["shellcheck", str(script)], check=True)
    job = Job.submit(cluster, shared_path, str(script))
    job.wait_for_step(10)
    cluster.kill_node("n2")
    wait_for("recovery", lambda: any(e.kind == "failure" for e in job.events(0)))
    job.signal()
    wait_for("the requeue", lambda: "restart 0, requeued" in job.shown().get("Comment", ""))
    # Else Slurm waits for the node to tell that the job has ended there.
    cluster.write_off("n2")
    shown = job.wait_for_state("PENDING")
    assert (shown["Restarts"], shown["ExcNodeList"]) == ("1", "n2")
    assert "restart 0, requeued without n2" in shown["Comment"]

    job.wait_for_restart(1)
    job.wait_for_step(30)
    job.signal("--batch")
    job.wait_for_state("PENDING")
    job.wait_for_restart(2)
    shown = job.wait_for_state("COMPLETED")
    assert "restart 2, finished" in shown["Comment"]
    first, second, third = job.summaries()
    assert [s["result"] for s in (first, second, third)] == ["interrupted", "interrupted", "ok"]
    assert [s["restarts"] for s in (first, second, third)] == [0, 1, 2]
    assert first["requeue"] == {"requeued": True, "why": "", "excluded": ["n2"]}
    assert third["restored_step"] == second["steps"] > second["restored_step"] == first["steps"]
    assert third["params_sha256"] == undisturbed(2)[96]


def test_a_node_that_is_lost_while_the_ranks_start_is_noticed_and_done_without(
    cluster: Cluster, shared_path: Path
) -> None:
    held = shared_path / "held"
    held.touch()
    (shared_path / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        f"while 'hpcft.world.rank' in sys.orig_argv and os.path.exists({str(held)!r}):\n"
        "    time.sleep(0.1)\n"
    )
    options = ("--nodes", "3", "--ranks-per-node", "1", "--spares", "1", "--time", "30:00")
    script = training(
        *(cluster, shared_path, "--steps", "20"), options=options, often=("--verbose", "2")
    )
    script.write_text(
        script.read_text().replace("\nexec", f"\nexport PYTHONPATH={shared_path}\nexec", 1)
    )
    job = Job.submit(cluster, shared_path, str(script))
    wait_for("all nodes", lambda: "hpcft: starting: all nodes are there" in job.output)
    (roll,) = shared_path.glob("hpcft-runs/*/roll-*.json")
    assert roll.stat().st_mode & 0o077 == 0
    cluster.kill_node("n3")
    wait_for("the requeue", lambda: "restart 0, requeued" in job.shown().get("Comment", ""))
    held.unlink()
    cluster.write_off("n3")
    shown = job.wait_for_state("COMPLETED")
    assert shown["ExcNodeList"] == "n3"
    assert "node n3 was lost while the ranks were starting" in job.output
    first, second = job.summaries()
    assert (first["result"], first["steps"], first["requeue"]["excluded"]) == ("failed", 0, ["n3"])
    assert (second["result"], second["steps"]) == ("ok", 20)
    assert not list(shared_path.glob("hpcft-runs/*-r1/roll-*"))


def test_a_job_whose_script_is_lost_with_its_node_ends_with_its_run(
    cluster: Cluster, shared_path: Path
) -> None:
    options = ("--nodes", "2", "--ranks-per-node", "1", "--time", "30:00")
    script = training(cluster, shared_path, "--steps", "40", "--pace", "0.1", options=options)
    job = Job.submit(cluster, shared_path, str(script))
    job.wait_for_step(5)
    host = job.shown()["BatchHost"]
    cluster.kill_node(host)
    cluster.write_off(host)
    job.wait_for_state("CANCELLED")
    (summary,) = job.summaries()
    assert (summary["result"], summary["steps"]) == ("ok", 40)


def test_a_preempted_job_goes_on_and_a_cancelled_one_does_not(
    cluster: Cluster, shared_path: Path
) -> None:
    words = [str(PROGRAM), "--steps", "100000", "--pace", "0.1"]
    job = Job.submit(
        cluster,
        shared_path,
        *("--partition=low", "--exclusive", "--ntasks-per-node=1", "--time=30:00"),
        *(str(TEMPLATES / "preemptible.sbatch"), *words),
    )
    job.wait_for_step(5)
    nodes = job.shown()["NodeList"]
    cluster.run("srun", f"--nodelist={nodes}", "--nodes=2", "--exclusive", "true", timeout=120)
    job.wait_for_restart(1)
    [first, *_] = job.summaries()
    assert (first["result"], first["requeue"]["requeued"]) == ("interrupted", True)
    job.wait_for_step(first["steps"] + 5)
    cluster.run("scancel", job.number)
    wait_for("the end", lambda: [s["requeue"] is None for s in job.summaries()] == [False] * 2)
    assert job.shown()["JobState"] in ("CANCELLED", "COMPLETING")
    _, second = job.summaries()
    assert second["result"] == "interrupted"
    assert second["checkpoints"][-1] == second["steps"] > first["steps"]
    assert not second["requeue"]["requeued"]
    assert "somebody has ended it" in second["requeue"]["why"]


def test_the_templates_of_arrays_gpus_and_chains(cluster: Cluster, shared_path: Path) -> None:
    """All at once, for each of them mostly waits."""
    short = [str(PROGRAM), "--steps", "24"]
    array = Job.submit(
        cluster,
        shared_path / "array",
        *("--array=3,7", str(TEMPLATES / "array.sbatch"), str(PROGRAM), "--steps", "2%a"),
    )
    seen = shared_path / "seen.py"
    seen.write_text(
        "import os, hpcft\nhpcft.init()\n"
        "print('gpu', os.environ['SLURM_PROCID'], os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    gpu = Job.submit(
        cluster,
        shared_path / "gpu",
        *("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=2"),
        *(str(TEMPLATES / "gpu.sbatch"), str(seen)),
    )
    links = [
        Job.submit(
            cluster,
            shared_path / "chain",
            *("--ntasks-per-node=1", str(TEMPLATES / "chain.sbatch"), *short, "--pace", "0.2"),
            name=name,
        )
        for name in ("first", "second")
    ]
    links[0].wait_for_step(3)
    links[0].signal()
    assert links[0].wait_for_state("FAILED")["ExitCode"] == "75:0"
    links[1].wait_for_state("COMPLETED")
    first, second = links[1].summaries()
    assert second["restored_step"] == first["steps"] < 24

    array.wait_for_state("COMPLETED")
    assert sorted(s["steps"] for s in array.summaries()) == [23, 27]
    names = {folder.name for folder in (shared_path / "array" / "checkpoints").iterdir()}
    assert names == {f"{array.number}_3", f"{array.number}_7"}

    gpu.wait_for_state("COMPLETED")
    logs = "".join(log.read_text() for log in gpu.folder.glob("hpcft-runs/*/logs/*.log"))
    seen_by = dict(line.split()[1:] for line in logs.splitlines() if line.startswith("gpu"))
    assert seen_by == {"0": "0", "1": "1", "2": "0", "3": "1"}


def test_spares_of_another_component_of_the_job(cluster: Cluster, shared_path: Path) -> None:
    job = Job.submit(
        cluster,
        shared_path,
        *(str(TEMPLATES / "het.sbatch"), str(PROGRAM), "--steps", "40", "--pace", "0.2"),
    )
    job.wait_for_step(3)
    [file] = shared_path.glob("hpcft-runs/*/ranks.json")
    ranks = json.loads(file.read_text())["ranks"]
    assert [rank["host"] for rank in ranks if rank["role"] == "spare"] == ["n3", "n3"]
    os.kill(next(rank["pid"] for rank in ranks if rank["logical"] == 1), signal.SIGKILL)
    job.wait_for_state("COMPLETED")
    [summary] = job.summaries()
    assert (summary["result"], summary["steps"]) == ("ok", 40)
    assert summary["world"] == {"initial": 4, "final": 4, "spares_left": 1}
    [failure] = summary["failures"]
    assert (failure["ranks"], failure["action"]) == ([1], "substitute")
