"""What can be seen of a directory of checkpoints while somebody writes to it."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Save, Saver
from hpcft.ckpt.store import Store
from hpcft.ckpt.watch import Aside, View, look
from hpcft.cli.main import main
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory

SIZE = 4 << 20
STATE = {"model": {"w": torch.arange(SIZE // 8)}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints").create()


def slowly(store: Store) -> Saver:
    """Takes a second or so for the state."""
    return Saver(store, Alone(), Engine(2 << 20, chunk=256 << 10, bandwidth=4 << 20))


def finish(saving: Save) -> None:
    while not saving.advance():
        time.sleep(0.001)
    saving.finish()


def seen_when(store: Store, wanted: Callable[[View], bool]) -> View:
    deadline = time.monotonic() + 20
    while not wanted(view := look(store)):
        assert time.monotonic() < deadline, view
    return view


def test_a_new_file_tells_how_far_it_is(store: Store) -> None:
    saving = slowly(store).begin(7, STATE)
    early = seen_when(store, lambda v: 0 < (v.aside[0].written or 0) < v.aside[0].bytes)
    later = seen_when(store, lambda v: (v.aside[0].written or 0) > (early.aside[0].written or 0))
    (one,) = later.aside
    assert SIZE <= one.bytes < 2 * SIZE
    assert one.last_write is not None
    assert one.last_write >= one.begun
    assert early.committed == later.committed == ()
    finish(saving)
    done = look(store)
    assert done.aside == ()
    (committed,) = done.committed
    assert (committed.step, committed.bytes) == (7, one.bytes)
    assert committed.saved >= one.last_write


def test_of_a_file_used_again_no_progress_is_invented(store: Store) -> None:
    saver = slowly(store)
    finish(saver.begin(1, STATE))
    size = look(store).committed[0].bytes
    store.discard(store.committed()[0])
    assert look(store).aside == ()  # nobody writes to it yet
    saving = saver.begin(2, STATE)
    (one,) = seen_when(store, lambda v: v.aside[0].last_write is not None).aside
    assert (one.written, one.rate, one.left) == (None, None, None)
    assert one.bytes == size
    finish(saving)
    assert [c.step for c in look(store).committed] == [2]


def test_rate_and_time_left() -> None:
    one = Aside("a", bytes=1000, written=400, begun=100.0, last_write=104.0)
    assert (one.rate, one.left) == (100.0, 6.0)
    barely = Aside("a", bytes=1000, written=400, begun=100.0, last_write=100.1)
    assert (barely.rate, barely.left) == (None, None)


def test_what_lies_about_is_no_reason_to_fail(store: Store) -> None:
    (store.path / ".aside-00000000").mkdir()
    (store.path / ".aside-11111111").write_text("no directory")
    (store.path / "step-000000000003").mkdir()
    view = look(store)
    assert view.aside == ()
    assert [(c.step, c.bytes) for c in view.committed] == [(3, None)]
    assert main(["ckpt", "top", str(store.path), "--once"]) == 0


def test_once_for_scripts(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saver = slowly(store)
    finish(saver.begin(1, STATE))
    store.discard(store.committed()[0])
    run = RunDirectory(tmp_path / "run")
    run.create(1, "")
    took = [{"path": "x", "seconds": s} for s in (3.0, 1.0, 2.0)]
    run.append([Event("checkpoint", i, detail=one) for i, one in enumerate(took)])
    run.append([Event("start", 0), Event("save failed", 9, detail={"why": "the disk is full"})])
    saving = saver.begin(2, STATE)
    seen_when(store, lambda v: v.aside[0].last_write is not None)
    argv = ["ckpt", "top", str(store.path), "--once", "--run", str(run.path)]
    assert main([*argv, "--json"]) == 0
    row: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert row["usual_s"] == 2.0
    assert [event["kind"] for event in row["events"]] == ["checkpoint"] * 3 + ["save failed"]
    assert row["aside"][0]["written"] is None
    assert 0 < row["free"] <= row["total"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "over an earlier one" in text
    assert "usually 2 s" in text
    assert "the disk is full" in text
    assert "nothing is committed" in text
    finish(saving)


def top(store: Store, *more: str, **how: Any) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "hpcft.cli.main", "ckpt", "top", str(store.path), *more]
    # Not as pytest may have inherited it.
    return subprocess.Popen(
        argv, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **how
    )


def test_a_line_a_look_until_ctrl_c(store: Store) -> None:
    with top(store, "--json", "--every", "0.05", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        rows = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert rows[0]["time"] < rows[1]["time"] < rows[2]["time"]


def test_live_at_a_terminal(store: Store) -> None:
    finish(slowly(store).begin(1, STATE))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with top(store, "--every", "0.1", stdout=theirs, env=environment) as process:
        os.close(theirs)
        text = b""
        while b"step-000000000002" not in text:
            if b"step-000000000001" in text and not store.committed()[1:]:
                finish(slowly(store).begin(2, STATE))
            text += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        # Or it would wait for the terminal.
        while process.poll() is None:
            try:
                os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait(20) == 0
    os.close(ours)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "there is no directory nowhere"),
        ([".", "--run", "nowhere"], "there is no directory nowhere"),
        ([".", "--every", "0"], "--every 0.0 makes no sense"),
    ],
)
def test_wrong_use(
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ckpt", "top", *argv, "--once"]) == 2
    assert says in capsys.readouterr().err
