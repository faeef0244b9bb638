"""One run at a time writes to a directory of checkpoints, whoever is killed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from training import wait_for

from hpcft.ckpt import lock
from hpcft.ckpt.lock import Lock, Standing, locked
from hpcft.ckpt.store import Store
from hpcft.cli.main import main
from hpcft.errors import UsageError

#: Has the lock, says so, and keeps it until its input ends; "forks" leaves a process behind.
_HOLDER = """
import os, sys, time
from pathlib import Path
from hpcft.ckpt.lock import Lock
directory, key, how = sys.argv[1:]
lock = Lock(Path(directory), "the run in /runs/1", key)
print(lock.take().name, flush=True)
if how == "forks" and os.fork() == 0:
    os.close(0)
    print("forked", flush=True)
    time.sleep(600)
sys.stdin.read()
lock.release()
"""

Hold = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts processes that have the lock."""
    started = []

    def start(key: str = "theirs", how: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLDER, str(tmp_path), key, how]
        pipe = subprocess.PIPE
        holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        started.append(holder)
        assert holder.stdout is not None
        assert holder.stdout.readline() == "OURS\n"
        return holder

    yield start
    for holder in started:
        holder.kill()
        holder.wait()
        for pipe in (holder.stdin, holder.stdout):
            assert pipe is not None
            pipe.close()


def kill(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()


def ours(tmp_path: Path, key: str = "ours") -> Lock:
    return Lock(tmp_path, "the run in /runs/2", key)


def no_look() -> None:
    """Nothing ends the waiting."""


def test_the_lock_of_another_is_not_taken_and_its_owner_named(tmp_path: Path, hold: Hold) -> None:
    holder = hold()
    mine = ours(tmp_path)
    assert mine.take() is Standing.TAKEN
    assert f"in use by the run in /runs/1 (process {holder.pid} on " in mine.said
    told: list[str] = []
    with pytest.raises(UsageError, match=r"/runs/1 .*") as refused:
        mine.wait(0, told.append, no_look)
    assert "another --ckpt-dir" in refused.value.remedy
    assert len(told) == 1
    # Nobody has waited for it, so nobody leaves it to a successor.
    kill(holder)
    other = ours(tmp_path)
    assert other.take() is other.take() is Standing.OURS
    assert mine.take() is Standing.KIN


def test_who_waits_gets_what_is_given_back(tmp_path: Path, hold: Hold) -> None:
    holder = hold()
    mine, told = ours(tmp_path), []

    def end(why: str) -> None:
        told.append(why)
        assert holder.stdin is not None
        holder.stdin.close()

    assert mine.wait(60, end, no_look) is Standing.OURS
    assert "waiting up to 60 s" in told[0]
    mine.release()
    assert list(tmp_path.iterdir()) == []
    assert mine.take() is Standing.OURS


def test_waiting_can_be_broken_off(tmp_path: Path, hold: Hold) -> None:
    hold()
    with pytest.raises(ZeroDivisionError):
        ours(tmp_path).wait(60, lambda why: None, lambda: 1 // 0)


def test_a_successor_comes_before_who_waits(tmp_path: Path, hold: Hold) -> None:
    holder = hold("theirs")
    mine, successor = ours(tmp_path), ours(tmp_path, "theirs")
    assert mine.take() is Standing.TAKEN
    assert successor.take() is Standing.KIN
    kill(holder)
    assert mine.take() is Standing.TAKEN
    # Looking leaves it free.
    assert successor.take() is Standing.OURS
    assert mine.take() is Standing.TAKEN
    successor.release()
    assert mine.take() is Standing.OURS


def test_without_a_successor_who_waits_gets_it_later(tmp_path: Path, hold: Hold) -> None:
    holder = hold()
    mine = ours(tmp_path)
    assert mine.take() is Standing.TAKEN
    kill(holder)
    with mock.patch.object(lock, "_SUCCESSION", 1.5):
        # Patience is for one who has it.
        assert mine.wait(0, lambda why: None, no_look) is Standing.OURS


def test_nobody_else_writes_meanwhile(tmp_path: Path, hold: Hold) -> None:
    holder = hold("theirs")
    with pytest.raises(OSError, match="in use by the run in /runs/1"):
        Store(tmp_path, ours(tmp_path)).begin(1)
    with pytest.raises(OSError, match="in use by the run in /runs/1"):
        Store(tmp_path, ours(tmp_path)).sweep()
    # A process of the same run does not wait for one that has died.
    Store(tmp_path, ours(tmp_path, "theirs")).begin(1)
    kill(holder)
    Store(tmp_path, ours(tmp_path)).begin(2)


def test_a_lingering_lock_is_pursued_in_the_background(tmp_path: Path, hold: Hold) -> None:
    holder = hold("kin")
    mine, told = ours(tmp_path, "kin"), threading.Event()
    mine.pursue(0.1, lambda why: told.set())
    mine.pursue(0.1, lambda why: told.set())
    assert told.wait(60)
    kill(holder)
    wait_for("the lock", lambda: mine.take() is Standing.OURS)
    mine.release()


def test_what_is_forked_off_does_not_keep_it(tmp_path: Path, hold: Hold) -> None:
    holder = hold(how="forks")
    assert holder.stdout is not None
    assert holder.stdout.readline() == "forked\n"
    # Nor does its parent lose it, by its end or otherwise.
    assert ours(tmp_path).take() is Standing.TAKEN
    kill(holder)
    assert ours(tmp_path).take() is Standing.OURS


def test_a_copy_of_the_directory_does_not_lose_it(tmp_path: Path) -> None:
    mine = ours(tmp_path)
    assert mine.take() is Standing.OURS
    (tmp_path / ".lock").read_bytes()
    assert ours(tmp_path, "another").take() is Standing.TAKEN


def test_where_nothing_can_be_locked_one_goes_on(tmp_path: Path) -> None:
    missing = Lock(tmp_path / "missing", "the run in /runs/2", "ours")
    assert missing.wait(0, pytest.fail, no_look) is Standing.NONE
    assert "No such file" in missing.why


def test_the_command_line_leaves_a_used_directory_alone(
    tmp_path: Path, hold: Hold, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = hold()
    for command in (["prune", str(tmp_path), "--keep", "1"], ["import", "x.pt", str(tmp_path)]):
        assert main(["ckpt", *command]) == 2
        assert "in use by the run in /runs/1" in capsys.readouterr().err
    assert main(["ckpt", "ls", str(tmp_path)]) == 0
    assert main(["ckpt", "prune", str(tmp_path), "--keep", "1", "--dry-run"]) == 0
    kill(holder)
    assert main(["ckpt", "prune", str(tmp_path), "--keep", "1"]) == 0
    with locked(tmp_path, "hpcft ckpt import"), pytest.raises(UsageError, match="ckpt import"):
        Lock(tmp_path, "", "").wait(0, lambda why: None, no_look)
    assert list(tmp_path.iterdir()) == []
