"""The lab, for tests."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import parallel
from cluster import SRUN, Cluster, missing
from parallel import ParallelFileSystem
from training import PROGRAM, Training


@pytest.fixture(scope="session")
def lab() -> Iterator[Cluster]:
    """Four Slurm nodes; taken down at the end if these tests have brought them up."""
    if reason := missing():
        pytest.skip(f"the Slurm lab {reason}")
    cluster = Cluster()
    was_up = cluster.is_up()
    cluster.up()
    yield cluster
    if not was_up:
        cluster.down()


@pytest.fixture
def cluster(lab: Cluster) -> Iterator[Cluster]:
    """The lab with all nodes well, before and after."""
    yield lab
    lab.revive()


@pytest.fixture
def allocation(cluster: Cluster) -> Iterator[str]:
    """The number of a job with all nodes that lasts when it loses one."""
    said = cluster.run("salloc", "--no-shell", "--no-kill", "-N4", "--exclusive").stderr
    job = said.split("job allocation ")[1].split()[0]
    yield job
    cluster.run("scancel", job)


@pytest.fixture(scope="module")
def mounted(lab: Cluster) -> Iterator[ParallelFileSystem]:
    """A parallel file system on all nodes."""
    if reason := parallel.missing():
        pytest.skip(f"a parallel file system {reason}")
    system = ParallelFileSystem(lab)
    system.up()
    yield system
    system.down()


@pytest.fixture
def storage(cluster: Cluster, mounted: ParallelFileSystem) -> Iterator[ParallelFileSystem]:
    """The parallel file system with all servers well, before and after."""
    yield mounted
    mounted.revive()


@pytest.fixture
def shared_path() -> Iterator[Path]:
    """A directory all nodes see; their /tmp is their own."""
    path = Path(tempfile.mkdtemp(prefix="hpcft-test-", dir="/var/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def state_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs of a test are told of where all nodes see it, as in a home directory."""
    home = Path(tempfile.mkdtemp(prefix="hpcft-test-", dir="/var/tmp"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def srun(cluster: Cluster, shared_path: Path) -> Iterator[Callable[..., Training]]:
    """Starts a training on the lab's nodes."""
    started: list[Training] = []

    def start(
        nodes: int, per_node: int, spares: int, *options: str, program: list[str] | None = None
    ) -> Training:
        words = [*SRUN, f"-N{nodes}", f"--ntasks-per-node={per_node}"]
        training = Training(
            shared_path / f"run{len(started)}",
            ["--spares", str(spares), *options],
            [str(PROGRAM), *(program or [])],
            cluster.command(words),
            cluster.environ(),
        )
        started.append(training.start())
        return training

    yield start
    for training in started:
        training.stop()
