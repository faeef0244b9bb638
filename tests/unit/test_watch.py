"""Runs seen from outside: which there are, whether they run, what they have printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcft.cli import runs as cli_runs
from hpcft.cli.main import main
from hpcft.telemetry import registry
from hpcft.telemetry.events import Event, Times, failure
from hpcft.telemetry.registry import Entry
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.watch.runs import SILENCE, Jobs, Run, find, known
from hpcft.watch.view import View, look, sweep
from hpcft.world.progress import peek


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield started
    started.kill()
    started.wait()


def registered(path: Path, pid: int, **fields: object) -> Run:
    path.mkdir(exist_ok=True)
    how = {"host": registry.host(), "born": registry.born(pid)} | fields
    registry.add(Entry(str(path), pid=pid, **how))  # type: ignore[arg-type]
    return find(str(path))


def seen(run: Run) -> View:
    return look(run, Jobs([run]))


def test_a_run_is_taken_for_alive_as_long_as_its_very_process_is(
    tmp_path: Path, process: subprocess.Popen[bytes]
) -> None:
    run = registered(tmp_path / "run", process.pid)
    assert seen(run).state == "starting"
    RunDirectory(tmp_path / "run").append(
        [Event("start", 0, (0,), detail={"active": 1, "spares": 0})]
    )
    assert seen(run).state == "training"
    process.kill()
    assert process.poll() is None or process.returncode
    deadline = time.monotonic() + 20
    while not seen(run).ended:  # a zombie is dead, too
        assert time.monotonic() < deadline
    assert seen(run).state == "killed"
    # Another process that has got its number.
    assert seen(registered(tmp_path / "other", os.getpid(), born="earlier")).state == "killed"


def test_where_nobody_can_be_asked_silence_tells(tmp_path: Path) -> None:
    run = registered(tmp_path / "run", 1, host="elsewhere")
    assert seen(run).state == "starting"
    status = {"step": 7, "stepped": 0.0, "rate": 2.0, "epoch": 0, "metrics": {"loss": None}}
    run.rundir.write_status(status | {"time": time.time()})
    view = seen(run)
    assert (view.state, view.step, view.rate, view.hosts) == ("training", 7, 2.0, ("elsewhere",))
    late = Entry("x", "elsewhere", 1, "", begun=time.time() - 2 * SILENCE)
    run.rundir.write_status(status | {"time": time.time() - 2 * SILENCE})
    assert seen(Run(run.rundir, late)).state == "silent"
    # Found by its directory alone, as in a copy of it.
    assert seen(Run(run.rundir, None)).state == "silent"


def test_a_run_in_the_same_directory_takes_the_place_of_the_former(tmp_path: Path) -> None:
    registered(tmp_path / "run", os.getpid())
    run = registered(tmp_path / "run", os.getpid(), begun=5.0)
    assert [other.entry for other in known()] == [run.entry]
    # A torn or foreign file is no reason to see nothing.
    (registry.folder() / "0123.json").write_text('{"run_dir": ')
    assert len(known()) == 1


def test_runs_are_named_by_directory_name_and_slurm_job(tmp_path: Path) -> None:
    registered(tmp_path / "a", 1, job="48", step="0", begun=1.0)
    registered(tmp_path / "b", 1, job="48", step="1", begun=2.0)
    registered(tmp_path / "c", 1, begun=3.0)
    assert find("48").name == find("48.1").name == find(str(tmp_path / "b")).name == "48.1"
    assert find("48.0").rundir.path == tmp_path / "a"
    assert find("c").rundir.path == tmp_path / "c"
    # What is unknown may be a directory still.
    (tmp_path / "d" / "logs").mkdir(parents=True)
    assert find(str(tmp_path / "d")).entry is None


def test_what_ended_long_ago_is_forgotten(tmp_path: Path) -> None:
    dead = {"born": "earlier"}
    recent = registered(tmp_path / "recent", 1, **dead)
    old = registered(tmp_path / "old", 1, begun=1.0, **dead)
    silent = registered(tmp_path / "silent", 1, begun=1.0, host="elsewhere")
    gone = registered(tmp_path / "gone", 1, **dead)
    # However long it takes.
    running = registered(tmp_path / "running", os.getpid(), begun=1.0)
    (tmp_path / "gone").rmdir()
    forgotten = [run.name for run in (recent, old, silent, gone, running) if sweep(run, seen(run))]
    assert forgotten == ["old", "silent", "gone"]
    assert sorted(run.name for run in known()) == ["recent", "running"]


@pytest.mark.parametrize("command", ["top", "logs", "stop", "ps"])
def test_what_is_no_run_is_said(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "nowhere"]) == 2
    assert "there is no run 'nowhere'" in capsys.readouterr().err
    assert main([command, str(tmp_path)]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err


def test_a_file_system_that_does_not_answer_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_runs, "PATIENCE", 0.2)
    registered(tmp_path / "well", os.getpid())
    hung = registered(tmp_path / "hung", os.getpid())
    os.mkfifo(hung.rundir.status_file)  # who opens it waits for a writer
    assert main(["ps", "--json"]) == 0
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["starting", "no answer"]
    assert main(["top", "hung"]) == 1
    assert "cannot be read: the file system has not answered" in capsys.readouterr().err


def test_a_run_of_another_host_is_not_signalled_from_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registered(tmp_path / "run", os.getpid(), host="elsewhere")
    assert main(["stop", "run"]) == 1
    assert f"end it there: hpcft stop {tmp_path / 'run'}" in capsys.readouterr().err


def failed_run(path: Path) -> RunDirectory:
    """Rank 1, process 1, was replaced by process 2, of which too many have failed then."""
    rundir = RunDirectory(path)
    rundir.create(3, "")
    times = Times(1.0, 1.1)
    healed = {"action": "substitute", "active": 2, "spares": 0}
    healed |= {"recover_s": 0.1, "lost_steps": 0, "phases": {}}
    rundir.append(
        [
            Event("start", 0, (0, 1), detail={"active": 2, "spares": 1}),
            failure(3, 1, 1, 1, "n1", "killed by SIGKILL", times),
            Event("resume", 3, (), 1, detail=healed),
            failure(5, 2, 1, 2, "n1", "out of memory", times),
            Event("failed", 5, detail={"reason": "no spare is left"}),
        ]
    )
    rows = [(0, 0), (1, 2)]
    ranks = [{"logical": n, "world": w, "host": "n1", "pid": 1, "role": "active"} for n, w in rows]
    rundir.write_ranks({"epoch": 1, "ranks": ranks})
    rundir.write_summary(summarise(rundir.events()))
    for world in range(3):
        rundir.log_file(world).write_text("".join(f"line {n} of {world}\n" for n in range(60)))
    return rundir


def test_the_logs_are_those_of_whoever_plays_or_played_a_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rundir = failed_run(tmp_path / "run")
    view = seen(Run(rundir, None))
    assert (view.state, view.reason, view.step) == ("failed", "no spare is left", 5)
    assert [(r.logical, r.world, r.role) for r in view.ranks] == [
        (0, 0, "active"),
        (1, 1, "lost"),
        (1, 2, "lost"),
    ]

    def shown(*words: str) -> list[str]:
        assert main(["logs", str(rundir.path), *words]) == 0
        return capsys.readouterr().out.splitlines()

    assert shown("-n", "1") == [
        "rank 0 | line 59 of 0",
        "rank 1 (killed by SIGKILL) | line 59 of 1",
        "rank 1 (out of memory) | line 59 of 2",
    ]
    assert len(shown("--rank", "1", "-n", "all")) == 120
    failed = shown("--failed")
    assert len(failed) == 80
    assert failed[0] == "rank 1 (killed by SIGKILL) | line 20 of 1"
    # A long last line, written over as progress bars are, without an end.
    rundir.log_file(0).write_text("x" * 5000 + "\nearlier\n0%\r50%\r" + "y" * 3000)
    assert shown("--rank", "0", "-n", "2") == [
        "rank 0 | " + "x" * 5000,
        "rank 0 | earlier",
        "rank 0 | " + "y" * 3000,
    ]
    assert shown("--rank", "0", "-n", "0", "-f") == ["rank 0 | " + "y" * 3000]
    assert main(["logs", str(rundir.path), "--rank", "7"]) == 2
    assert main(["logs", str(rundir.path), "-n", "some"]) == 2


def test_a_page_of_progress_can_be_seen_through_the_kernel() -> None:
    # In a process of its own, for tests before this may have left pages in ours.
    program = (
        "from hpcft.world.progress import Progress\n"
        "page = Progress.create()\n"
        "page.run(True)\npage.step(41)\npage.enter()\n"
        "print(flush=True)\ninput()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as rank:
        assert rank.stdout is not None
        rank.stdout.readline()
        reading = peek(rank.pid)
        rank.kill()
    assert reading is not None
    assert (reading.running, reading.step, reading.waiting) == (True, 41, True)
    assert peek(2**22 + 1) is None
