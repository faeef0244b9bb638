"""Directories that several processes make at once."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from hpcft.telemetry.folder import make_folder


def test_all_that_make_it_at_once_have_the_same(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    failed: list[BaseException] = []

    def make(i: int, path: Path, start: threading.Barrier) -> None:
        start.wait()
        try:
            make_folder(path)
            (path / str(i)).touch()
        except OSError as error:
            failed.append(error)

    try:
        for number in range(50):
            path, start = tmp_path / str(number) / "run" / "logs", threading.Barrier(6)
            makers = [threading.Thread(target=make, args=(i, path, start)) for i in range(6)]
            for maker in makers:
                maker.start()
            for maker in makers:
                maker.join()
            assert not failed
            assert sorted(e.name for e in path.iterdir()) == list("012345")
            assert [e.name for e in path.parent.iterdir()] == ["logs"]
            assert [e.name for e in path.parent.parent.iterdir()] == ["run"]
    finally:
        sys.setswitchinterval(interval)


def test_what_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    make_folder(tmp_path)
    assert (tmp_path / "file").exists()


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises((NotADirectoryError, FileExistsError)):
            make_folder(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
