"""What TensorBoard itself reads of what was written for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from disks import Disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpcft.telemetry.laps import Lap
from hpcft.train.tensorboard import Board


@pytest.fixture
def said() -> list[str]:
    """What is told at the terminal."""
    return []


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def steps(board: Board, first: int, last: int, value: float) -> None:
    for step in range(first, last + 1):
        board.stepped(step, {"loss": value, "none": "text"})  # type: ignore[dict-item]


def test_metrics_laps_and_failures_are_there(tmp_path: Path, said: list[str]) -> None:
    board = Board(tmp_path / "a" / "b", said.append)
    steps(board, 1, 3, 0.5)
    board.lapped(Lap(0, 0, 0, 1, 4, 10.0, 12.0, 2.0, 1.0, 0.5, {}), ranks=3)
    board.failed(3, "rank 1 failed", 0.25)
    board.close()
    found = read(tmp_path / "a" / "b")
    assert scalars(tmp_path / "a" / "b", "loss") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert "none" not in found.Tags()["scalars"]
    values = {
        tag.removeprefix("hpcft/"): (event.step, event.value)
        for tag in found.Tags()["scalars"]
        if tag.startswith("hpcft/")
        for event in found.Scalars(tag)
    }
    assert values == {
        "ranks": (4, 3),
        "steps_per_second": (4, 2),
        "seconds_per_step/computing": (4, 0.5),
        "seconds_per_step/waiting": (4, 0.25),
        "seconds_per_step/saving": (4, 0.125),
        "recovery_seconds": (4, 0.25),
    }
    [text] = found.Tensors("hpcft/failures/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (4, [b"rank 1 failed"])
    assert said == []


def test_steps_done_again_take_the_place_of_those_before(tmp_path: Path, said: list[str]) -> None:
    board = Board(tmp_path, said.append)
    steps(board, 1, 9, 1.0)
    board.goes_on(4)
    steps(board, 5, 6, 2.0)
    # A failure that costs no step.
    board.goes_on(6)
    board.failed(6, "rank 1 failed", 0.1)
    steps(board, 7, 7, 3.0)
    board.close()
    after = [(5, 2.0), (6, 2.0), (7, 3.0)]
    assert scalars(tmp_path, "loss") == [(step, 1.0) for step in range(1, 5)] + after


def test_another_process_goes_on(tmp_path: Path, said: list[str]) -> None:
    first, second = (Board(tmp_path, said.append) for _ in range(2))
    steps(first, 1, 12, 1.0)
    # Dead, as far as the second knows, and yet not quite.
    first.close()
    second.goes_on(10)
    steps(second, 11, 13, 2.0)
    second.close()
    loss = scalars(tmp_path, "loss")
    assert loss == [(n, 1.0) for n in range(1, 11)] + [(n, 2.0) for n in range(11, 14)]
    # In the order of their names, however fast that was.
    assert [path.name[:13] for path in sorted(tmp_path.iterdir())] == [
        "events.000001",
        "events.000002",
    ]


def test_who_does_not_write_leaves_nothing(tmp_path: Path, said: list[str]) -> None:
    board = Board(tmp_path / "board", said.append)
    board.goes_on(3)
    board.close()
    assert not (tmp_path / "board").exists()


def test_a_full_disk_is_told_once_and_got_over(disk: Disk, said: list[str]) -> None:
    board = Board(disk.path / "board", said.append)
    board.stepped(1, {"loss": 1.0})
    assert board.write()
    filler = disk.fill()
    for step in range(2, 400):
        board.stepped(step, {"loss": 2.0, "what is long " + 100 * "x": 0.0})
    assert not board.write()
    assert not board.write()
    filler.unlink()
    assert board.write()
    board.close()
    assert scalars(disk.path / "board", "loss") == [
        (1, 1.0),
        *((step, 2.0) for step in range(2, 400)),
    ]
    [line] = said
    assert "TensorBoard's files cannot be written" in line
    assert "No space left" in line


def test_a_disk_that_hangs_keeps_nobody(disk: Disk, said: list[str]) -> None:
    board = Board(disk.path / "board", said.append)
    steps(board, 1, 1, 1.0)
    disk.freeze()
    steps(board, 2, 200_000, 1.0)
    board.close()
    disk.thaw()
    assert json.dumps(said) == "[]"
