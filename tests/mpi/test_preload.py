"""Modules that are imported once, before the ranks that need them are forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training import PROGRAM, Training, family, kill_all, launched, running, wait_for, warm

Preloading = Callable[..., Training]

pytestmark = pytest.mark.mpi

#: The module says who imports it, and changes what the script goes by.
MODULE = """
import os, sys
import helper
with open(os.path.join(os.path.dirname(__file__), "imports"), "a") as file:
    print(os.getpid(), sys.argv[1:3], "LOCAL_RANK" in os.environ, sep="|", file=file)
os.environ["OF_DATA"] = "kept"
"""
#: What the script does with it.
USE = """
import data
print("with data", os.environ["OF_DATA"], "LOCAL_RANK" in os.environ, flush=True)
"""


@pytest.fixture
def preloading(tmp_path: Path) -> Iterator[Preloading]:
    """Starts a training of two ranks with ``--preload data``, which its script imports as well."""
    started = []

    def start(module: str, *options: str) -> Training:
        (tmp_path / "helper.py").touch()
        (tmp_path / "data.py").write_text(MODULE + module)
        script = tmp_path / "train.py"
        text = PROGRAM.read_text()
        assert text.count("\nimport hpcft\n") == 1
        script.write_text(text.replace("\nimport hpcft\n", f"\nimport hpcft\n{USE}"))
        given = ["--nproc", "2", "--preload", "data", "--ckpt-every", "5", *options]
        given += ["--ckpt-dir", str(tmp_path / "checkpoints")]
        program = [os.path.relpath(script), "--steps", "300", "--pace", "0.1"]
        program += ["--until", str(tmp_path / "go")]
        started.append(Training(tmp_path / "run", given, program).start())
        return started[-1]

    yield start
    for run in started:
        run.stop()


def imports(path: Path) -> list[int]:
    """The processes that have imported the module, each as often as it has."""
    file = path / "imports"
    lines = file.read_text().splitlines() if file.exists() else []
    return [int(line.split("|")[0]) for line in lines]


def ranks(run: Training) -> set[int]:
    return {entry["pid"] for entry in run.ranks()}


def relaunch(run: Training, times: int) -> None:
    """Kill all ranks once they have been launched so often, and wait until they are again."""
    launched(run, times)
    run.wait_for_step(run.step() + 6)
    kill_all(run)
    launched(run, times + 1)


def test_a_relaunched_rank_has_what_was_imported_before_it(
    preloading: Preloading, tmp_path: Path
) -> None:
    # What has ended when the module is there is no obstacle.
    pool = "import multiprocessing\nwith multiprocessing.Pool(2) as pool: pool.map(abs, [1])\n"
    # And what a script is started with is as it was.
    run = preloading(f"{pool}os.chdir('/'); sys.argv.append('--no-option')\n")
    launched(run, 1)
    first = imports(tmp_path)
    relaunch(run, 1)
    # None of the ranks has imported it.
    assert imports(tmp_path) == first
    assert len(first) == 1
    assert not ranks(run) & set(first)
    text = (tmp_path / "imports").read_text()
    assert text.count("|['--steps', '300']|False\n") == 1
    assert run.logs().count("with data kept True\n") == 4
    # A warm process that is started again imports it again.
    for process in warm(run):
        process.kill()
    relaunch(run, 2)
    again = imports(tmp_path)[1:]
    assert len(again) == 1
    assert not ranks(run) & set(again)
    (tmp_path / "go").touch()
    run.finish()
    assert "warning: --preload" not in run.logs()
    wait_for("all to end", lambda: not family(run.run_dir))


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        ("os.environ['LOCAL_RANK']", "it raises KeyError: 'LOCAL_RANK'"),
        ("from mpi4py import MPI; MPI.Is_initialized() or MPI.Init()", "it raises RuntimeError: "),
        ("import torch; torch.set_num_threads(2); torch.ones(10**6).sum()", "it has started thr"),
        # It was not started, and MPI aborts.
        ("from mpi4py import MPI; MPI.COMM_WORLD.rank", "the process that has imported it has end"),
    ],
)
def test_what_cannot_be_preloaded_is_imported_by_the_ranks(
    preloading: Preloading, tmp_path: Path, module: str, problem: str
) -> None:
    run = preloading(module)
    relaunch(run, 1)
    (tmp_path / "go").touch()
    run.finish()
    assert run.output.count("hpcft: warning: --preload") == 1
    assert f"hpcft: warning: --preload data: {problem}" in run.output
    # In vain before, and then by each rank of two launches.
    assert len(imports(tmp_path)) == 5
    assert ranks(run) <= set(imports(tmp_path))


def test_what_a_process_that_was_given_up_has_started_ends_with_it(
    preloading: Preloading, tmp_path: Path
) -> None:
    module = (
        "import subprocess, threading, time\n"
        "if 'LOCAL_RANK' not in os.environ:\n"
        "    subprocess.Popen(['sleep', '600'])\n"
        "    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    run = preloading(module)
    launched(run, 1)
    assert "--preload data: it has started threads" in run.output
    assert not running(run, "sleep")


def test_ranks_train_on_and_are_relaunched_without_what_was_preloaded(
    preloading: Preloading, tmp_path: Path
) -> None:
    run = preloading("")
    launched(run, 1)
    first = imports(tmp_path)
    trained = ranks(run)
    for pid in first:
        os.kill(pid, signal.SIGKILL)
    wait_for("it to be missed", lambda: run.output.count("has ended (SIGKILL)") == 1)
    run.wait_for_step(run.step() + 3)
    assert ranks(run) == trained
    relaunch(run, 1)
    assert set(imports(tmp_path)) == {*first, *ranks(run)}
    (tmp_path / "go").touch()
    run.finish()


def test_a_guest_preloads_before_others_wait_for_it(preloading: Preloading, tmp_path: Path) -> None:
    run = preloading("", "--nproc", "2:3")
    launched(run, 1)
    run.wait_for_step(3)
    command = [sys.executable, "-m", "hpcft.cli.main", "join", str(run.run_dir), "--ranks", "1"]
    guest = subprocess.Popen(command, env=run.environ)
    try:
        launched(run, 2)
        assert len(set(imports(tmp_path))) == len(imports(tmp_path)) == 2
        assert not ranks(run) & set(imports(tmp_path))
        (tmp_path / "go").touch()
        run.finish()
    finally:
        guest.terminate()
        guest.wait(30)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_while_a_module_loads(
    preloading: Preloading, tmp_path: Path, number: int
) -> None:
    run = preloading("import time\ntime.sleep(600)\n")
    wait_for("it to load", lambda: imports(tmp_path))
    run.process.send_signal(number)
    run.wait(code=128 + number, seconds=60)
    wait_for("all to end", lambda: not family(run.run_dir))


def test_a_module_that_is_not_there_is_said_before_anything_is_started(
    preloading: Preloading, tmp_path: Path
) -> None:
    run = preloading("", "--preload", "helper,dataset")
    run.wait(code=2)
    assert f"there is no module 'dataset' to --preload in {tmp_path}" in run.output
    assert not run.run_dir.exists()
    assert not imports(tmp_path)
