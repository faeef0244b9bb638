"""Checkpoints in the memory of the nodes: what a lost node had is on another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cluster import SRUN, Cluster
from training import HERE, Training, wait_for

#: With tensors of which every rank writes a part.
PROGRAMS = {
    name: [str(HERE / "programs" / f"{name}.py"), "--width", width]
    for name, width in (("train", "4000"), ("train_fsdp", "300"))
}
Launch = Callable[..., Training]
NEAR = ("--ckpt-near", "5")

pytestmark = pytest.mark.slurm


@pytest.fixture
def train(cluster: Cluster, allocation: str, shared_path: Path) -> Iterator[Launch]:
    """Starts a training on some of the allocation's nodes."""
    started: list[Training] = []

    def start(program: str, nodes: str, *arguments: str, near: Sequence[str] = NEAR) -> Training:
        count = nodes.count(",") + 1
        # Slurm holds on to what a step had on a node that is lost.
        words = [*SRUN, "--overlap", f"--jobid={allocation}", f"-N{count}", f"-w{nodes}"]
        options = ["--ckpt-dir", str(shared_path / "checkpoints"), "--ckpt-every", "1000"]
        run = Training(
            shared_path / f"run{len(started)}",
            [*options, *near],
            [*PROGRAMS[program], *arguments],
            cluster.command(words),
            cluster.environ(),
        )
        started.append(run.start())
        return run

    yield start
    for run in started:
        run.stop()


def near(cluster: Cluster, node: str) -> list[Path]:
    """The parts of checkpoints on a node."""
    # Other than Path.glob, find goes on where a folder has been removed meanwhile.
    look = ["nsenter", "--mount", f"--target={cluster.slurmd(node)}"]
    look += ["find", "-H", "/dev/shm", "/tmp", "-path", "*/hpcft-near-*", "-type", "f"]
    found = subprocess.run(look, capture_output=True, text=True, check=False).stdout.splitlines()
    return [Path(file) for file in found if re.search(r"/(state|shard|parity)[^/]*$", file)]


def step(file: Path) -> int:
    folder = file.parents[1] if file.parent.name == "copies" else file.parent
    return int(folder.name.split("-")[0])


def protected(run: Training, cluster: Cluster, steps: int = 2) -> bool:
    """Whether every node has copies of so many checkpoints."""
    assert run.process.poll() is None
    return all(
        len({step(file) for file in near(cluster, node) if file.parent.name == "copies"}) >= steps
        for node in cluster.nodes
    )


def kill(run: Training) -> None:
    """All processes of the run, on all nodes, at once."""
    ranks = [entry["pid"] for entry in run.ranks()]
    everybody = [*map(parent, ranks), *ranks, run.process.pid]
    for pid in everybody:
        os.kill(pid, signal.SIGKILL)
    run.process.wait()
    wait_for("their end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in everybody))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.parametrize(
    ("program", "near_options"),
    [
        ("train", NEAR),
        ("train_fsdp", ("--ckpt-near", "5:/tmp")),
        ("train_fsdp", (*NEAR, "--ckpt-near-copies", "xor:4")),
    ],
)
def test_what_a_lost_node_had_comes_from_others(
    cluster: Cluster, train: Launch, program: str, near_options: Sequence[str]
) -> None:
    run = train(program, "n1,n2,n3,n4", "--pace", "0.05", "--steps", "1000", near=near_options)
    wait_for("copies", lambda: protected(run, cluster))
    kill(run)
    cluster.kill_node("n2")
    there = max(map(step, near(cluster, "n1")))
    again = train(program, "n1,n3,n4", "--steps", str(there + 5), near=near_options)
    summary = again.finish()
    assert summary["restored_step"] > there - 10
    assert "on the nodes" in again.output
    assert not any(near(cluster, node) for node in ("n1", "n3", "n4"))
