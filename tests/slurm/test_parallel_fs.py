"""Checkpoints on a real parallel file system that loses its servers in the middle of saves."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from parallel import MOUNT, ParallelFileSystem
from training import Training, family, wait_for

from hpcft.ckpt import filesystem
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.files import OpenFile, flush_directory
from hpcft.ckpt.lock import Owner
from hpcft.ckpt.restore import load
from hpcft.ckpt.store import Store

pytestmark = pytest.mark.slurm

Srun = Callable[..., Training]

#: 2 MB of parameters, 6 MB of state; more than one save a second is not wanted.
WIDE = ["--width", "25000", "--steps", "60"]
#: A save takes a second, of which there is a middle.
SLOW = ["--ckpt-bandwidth", "2M"]

#: Digest of an undisturbed run of three ranks; made on first use.
_undisturbed: list[str] = []


@pytest.fixture
def undisturbed(srun: Srun) -> str:
    if not _undisturbed:
        _undisturbed.append(srun(1, 3, 0, program=WIDE).finish()["params_sha256"])
    return _undisturbed[0]


@pytest.fixture
def folder(storage: ParallelFileSystem) -> Path:
    """A directory on it."""
    return MOUNT / secrets.token_hex(4)


def options(folder: Path, every: int, *more: str) -> list[str]:
    return ["--ckpt-dir", str(folder), "--ckpt-every", str(every), *more]


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Store(folder).committed()]


def saving(folder: Path) -> bool:
    """Whether a save is under way."""
    return folder.exists() and any(folder.glob(".aside-*/state.h5"))


def kinds(run: Training, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == kind]


def verify(cluster: Cluster, folder: Path) -> list[int]:
    """The steps of all committed checkpoints, each whole, as a node finds that served nothing."""
    done = cluster.run(
        *("srun", "-w", "n4", sys.executable, "-m", "hpcft.cli.main", "ckpt", "verify", str(folder))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    engine = Engine(16 << 20)
    for checkpoint in Store(folder).committed():
        step, content = load(checkpoint.state, engine)
        assert content["values"]["seen"] == step * 16
        assert content["optimizer"]["state"][0]["step"].item() == step
    return steps(folder)


def test_what_a_checkpoint_needs_of_it_holds(folder: Path, cluster: Cluster) -> None:
    folder.mkdir()
    file = folder / "file"
    other = [sys.executable, "-c"]

    def elsewhere(program: str) -> str:
        done = cluster.run("srun", "-w", "n4", *other, f"path = {str(file)!r}\n{program}")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    file.write_bytes(b"old" * 10_000)
    read = "print(open(path, 'rb').read() == b'{}' * 10_000)"
    assert elsewhere(read.format("old")) == "True"
    with OpenFile.for_reading(file) as ours:
        assert ours.read(0, 3) == b"old"
        assert ours.direct >= 0
    # Written over by another node, the file is read as it is now, whatever is cached here.
    elsewhere("f = open(path, 'r+b'); f.write(b'new' * 10_000); f.close()")
    with OpenFile.for_reading(file) as ours:
        assert ours.read(0, 30_000) == b"new" * 10_000
    # What lies in a directory goes on being written to when the directory is renamed.
    inside = folder / "aside" / "file"
    inside.parent.mkdir()
    with OpenFile.for_writing(inside) as ours:
        flush_directory(folder)
        inside.parent.rename(folder / "committed")
        os.pwrite(ours.buffered, b"late", 0)
    file = folder / "committed" / "file"
    assert elsewhere("print(open(path).read())") == "late"


def test_nodes_may_make_the_same_directory_at_once(cluster: Cluster, folder: Path) -> None:
    # With plain mkdir some of these are not the same on all servers, and good for nobody.
    folder.mkdir()
    program = (
        "import pathlib, time; from hpcft.telemetry.folder import make_folder\n"
        "start = time.time() // 2 * 2 + 4\n"
        "for i in range(100):\n"
        "    time.sleep(max(0, start + i * 0.02 - time.time()))\n"
        f"    make_folder(pathlib.Path({str(folder)!r}, str(i), 'logs'))\n"
        f"    pathlib.Path({str(folder)!r}, str(i), 'logs', str(time.time_ns())).touch()"
    )
    done = cluster.run("srun", "-N4", sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("*"))) == 100
    assert len(list(folder.glob("*/logs/*"))) == 400


def test_its_kind_is_told(folder: Path) -> None:
    folder.mkdir()
    assert filesystem.at(folder) == filesystem.FileSystem("fuse.glusterfs")


def test_a_lock_counts_on_all_nodes_until_its_process_ends(cluster: Cluster, folder: Path) -> None:
    folder.mkdir()
    lock = "import pathlib, sys, time; from hpcft.ckpt.lock import Lock; path = pathlib.Path({!r});"
    lock = lock.format(str(folder)) + "print(Lock(path, 'a run', {!r}).take().name, flush=True);"
    node = ["srun", "-w", "n1", sys.executable, "-c"]
    holder = cluster.start(*node, lock.format("one") + "time.sleep(600)", stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "OURS\n"
    elsewhere = ["srun", "-w", "n2", sys.executable, "-c", lock.format("another")]
    assert cluster.run(*elsewhere).stdout == "TAKEN\n"
    owner = Owner.of((folder / ".lock").read_bytes())
    assert owner is not None
    assert owner.host == "n1"
    os.kill(owner.pid, signal.SIGKILL)
    wait_for("the lock to be free", lambda: cluster.run(*elsewhere).stdout == "OURS\n")
    holder.communicate()


def test_killed_altogether_and_started_again(
    cluster: Cluster, srun: Srun, folder: Path, undisturbed: str
) -> None:
    # Each rank to a file of its own at first, then all to one.
    run = srun(3, 1, 0, *options(folder, 5, "--ckpt-layout", "per-rank"), program=WIDE)
    run.wait_for_step(10)
    wait_for("two checkpoints", lambda: len(steps(folder)) >= 2)
    for pid in family(run.run_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)
    before = verify(cluster, folder)
    assert len(list(folder.glob("step-*/shard-*.h5"))) == 3 * len(before)
    run = srun(3, 1, 0, *options(folder, 5), program=WIDE)
    summary = run.finish()
    assert [event["detail"]["layout"] for event in kinds(run, "layout")] == ["shared"]
    assert summary["restored_step"] == before[-1]
    assert summary["params_sha256"] == undisturbed
    # A busy machine may have skipped some.
    newest_three = [*before, *summary["checkpoints"]][-3:]
    assert newest_three[-1] == 60
    assert verify(cluster, folder) == newest_three
    assert not list(folder.glob("step-000000000060/shard-*.h5"))


def test_a_server_that_dies_while_saving(
    cluster: Cluster, srun: Srun, storage: ParallelFileSystem, folder: Path, undisturbed: str
) -> None:
    run = srun(3, 1, 0, *options(folder, 10, *SLOW), program=WIDE)
    run.wait_for_step(10)
    wait_for("a save", lambda: saving(folder))
    storage.kill_server("n1")
    summary = run.finish()
    # The others take what is written; that save and the ones after it are committed.
    assert kinds(run, "save failed") == []
    assert 10 in summary["checkpoints"]
    assert summary["checkpoints"][-1] == 60
    assert summary["params_sha256"] == undisturbed
    assert verify(cluster, folder)[-1] == 60


def test_all_servers_die_while_saving_and_come_back(
    cluster: Cluster,
    srun: Srun,
    shared_path: Path,
    storage: ParallelFileSystem,
    folder: Path,
    undisturbed: str,
) -> None:
    back = shared_path / "back"
    paced = [*WIDE, "--pace", "0.5", "--until", str(back)]
    run = srun(3, 1, 0, *options(folder, 2, *SLOW), program=paced)
    run.wait_for_step(3)
    wait_for("a checkpoint and a save", lambda: saving(folder) and steps(folder))
    storage.kill_server(*storage.servers)
    at = run.step()
    wait_for("a save to fail", lambda: kinds(run, "save failed"))
    run.wait_for_step(at + 3)
    assert "training goes on without it" in run.output
    storage.revive()
    back.touch()
    summary = run.finish()
    assert summary["failures"] == []
    assert summary["checkpoints"][-1] == 60
    assert summary["params_sha256"] == undisturbed
    assert verify(cluster, folder)[-1] == 60


def test_servers_that_hang_do_not_keep_the_run(
    cluster: Cluster,
    srun: Srun,
    shared_path: Path,
    storage: ParallelFileSystem,
    folder: Path,
    undisturbed: str,
) -> None:
    hung = shared_path / "hung"
    paced = [*WIDE, "--pace", "0.1", "--until", str(hung)]
    run = srun(3, 1, 0, *options(folder, 10, *SLOW, "--ckpt-timeout", "2"), program=paced)
    run.wait_for_step(11)
    wait_for("a checkpoint and a save", lambda: saving(folder) and steps(folder))
    storage.hang()
    hung.touch()
    summary = run.finish()
    # Training has gone on to its end, and has said that this was not saved.
    assert summary["params_sha256"] == undisturbed
    assert summary["steps"] == 60
    assert {e["detail"]["why"] for e in kinds(run, "save skipped")}
    assert "no checkpoint of step 60: the file system does not answer" in run.output
    assert "is left behind" in run.output
    storage.revive()
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)
    committed = verify(cluster, folder)
    summary = srun(3, 1, 0, *options(folder, 10), program=WIDE).finish()
    assert summary["restored_step"] == committed[-1]
    assert summary["params_sha256"] == undisturbed
