"""The command ``hpcft ckpt``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Store
from hpcft.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, of which the second differs from the first in one tensor."""
    store = Store(tmp_path / "checkpoints").create()
    saver = Saver(store, Alone(), Engine(4 << 20, chunk=1 << 20))
    state = {"model": {"a": torch.zeros(30_000), "b": torch.ones(3, 4).bfloat16()}, "lr": 0.1}
    for step in (10, 20, 30):
        save = saver.begin(step, state)
        while not save.advance():
            pass
        save.finish()
        state["model"]["a"] = state["model"]["a"] + 1
    return store.path


def damage(folder: Path, name: str) -> None:
    """Spoil the tensor /model/a."""
    rows = Store(folder).committed()
    file = next(c.state for c in rows if c.path.name == name)
    raw = bytearray(file.read_bytes())
    place = raw.index(torch.ones(30_000).numpy().tobytes())
    raw[place + 7] ^= 1
    file.write_bytes(raw)


def said(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    assert main(["ckpt", *map(str, argv)]) == code
    return capsys.readouterr().out


def rows(
    capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0
) -> list[dict[str, object]]:
    return [json.loads(line) for line in said(capsys, *argv, "--json", code=code).splitlines()]


def test_ls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = rows(capsys, "ls", folder)
    assert [(row["step"], row["leaves"], row["damage"]) for row in listed] == [
        (10, 3, None),
        (20, 3, None),
        (30, 3, None),
    ]
    text = said(capsys, "ls", folder)
    assert "step-000000000020" in text
    (folder / "step-000000000020" / "state.h5").write_bytes(b"no checkpoint")
    assert "this is not a checkpoint of hpcft" in said(capsys, "ls", folder, code=1)


def test_ls_tells_when_a_file_was_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A directory that is used again keeps the time of the first checkpoint in it.
    for checkpoint in Store(folder).committed():
        os.utime(checkpoint.state, (1e9, 1e9 + checkpoint.step))
    assert [row["saved"] for row in rows(capsys, "ls", folder)] == [1e9 + n for n in (10, 20, 30)]


def test_show_tells_the_newest_of_a_directory(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {row["path"]: row for row in rows(capsys, "show", folder)}
    assert shown["/model/b"]["dtype"] == "bfloat16"
    assert shown["/model/b"]["shape"] == [3, 4]
    assert shown["/lr"]["kind"] == "float"
    text = said(capsys, "show", folder, "--under", "/model")
    assert "step 30" in text
    assert "3 x 4" in text
    assert "117.2 KiB" in text
    assert "/lr" not in text


def test_verify_reads_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", folder).count("good: ") == 3
    damage(folder, "step-000000000020")
    text = said(capsys, "verify", folder, code=1)
    assert text.count("good: ") == 2
    assert "step-000000000020/state.h5: /model/a" in text
    told = rows(capsys, "verify", folder / "step-000000000020", code=1)
    assert [(row["ok"], row["damaged"]) for row in told] == [(False, ["/model/a"])]


def test_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = folder / "step-000000000010", folder / "step-000000000030" / "state.h5"
    assert rows(capsys, "diff", old, new, code=1) == [
        {"path": "/model/a", "what": "another content"}
    ]
    assert "they hold the same" in said(capsys, "diff", new, folder)


def test_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "would remove" in said(capsys, "prune", folder, "--keep", "2", "--dry-run")
    assert len(Store(folder).committed()) == 3
    assert [row["step"] for row in rows(capsys, "prune", folder, "--keep", "2")] == [10]
    assert sorted(entry.name for entry in folder.iterdir()) == [
        "step-000000000020",
        "step-000000000030",
    ]
    assert "nothing to remove" in said(capsys, "prune", folder, "--keep", "2")


def test_metrics_are_listed_and_prune_goes_by_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    for step, loss in ((10, 3.0), (20, 0.125), (30, 1.0), (40, 2.0)):
        save = Saver(store, Alone(), Engine(16 << 20)).begin(step, {"w": step}, {"loss": loss})
        while not save.advance():
            pass
        save.finish()
    assert [row["metrics"] for row in rows(capsys, "ls", tmp_path)][1] == {"loss": 0.125}
    assert "0.125" in said(capsys, "ls", tmp_path)
    kept = ["--keep", "1", "--keep-nth", "30", "--keep-best", "loss"]
    assert [row["step"] for row in rows(capsys, "prune", tmp_path, *kept)] == [10]
    assert [row["step"] for row in rows(capsys, "prune", tmp_path, "--keep", "1")] == [20, 30]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ls", "nowhere"], "there is no directory nowhere"),
        (["show", "nowhere"], "there is no directory nowhere"),
        (["prune", ".", "--keep", "0"], "--keep 0 would remove them all"),
        (["prune", ".", "--keep", "1", "--keep-nth", "-2"], "--keep-nth -2 makes no sense"),
        (["prune", ".", "--keep", "1", "--keep-best", ":"], "':' names no metric"),
        (["verify", "."], "there is no checkpoint in ."),
    ],
)
def test_wrong_use_is_one_line(
    argv: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ckpt", *argv]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["ckpt", "--help"])
    assert "hpcft ckpt verify DIR" in capsys.readouterr().out
