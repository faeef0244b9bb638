"""The story of a run: written as events, read back, and told in the summary."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.telemetry import events as log
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise

START = Event("start", 0, (0, 1, 2), 0, 1000.0, {"active": 3, "spares": 2})


def failure(epoch: int, step: int, *ranks: int, cause: str = "killed by SIGKILL") -> Event:
    detail = {"cause": cause, "detect_s": 0.002, "role": "active" if ranks else "spare"}
    return Event("failure", step, ranks, epoch, 1010.0, detail)


def resume(epoch: int, step: int, action: str, active: int, spares: int, **more: Any) -> Event:
    detail = {
        "action": action,
        "active": active,
        "spares": spares,
        "recover_s": 0.1 * epoch,
        "lost_steps": 0,
        "phases": {"agree": 0.01 * epoch},
        **more,
    }
    return Event("resume", step, tuple(range(active)), epoch, 1011.0, detail)


def recovered(epoch: int, step: int, stall: float) -> Event:
    return Event("recovered", step, (), epoch, 1012.0, {"stall_s": stall})


def finish(step: int, digest: str | None = "abc") -> Event:
    return Event("finish", step, (), 0, 1060.1234, {"params_sha256": digest})


def test_a_run_without_failures_is_told_in_full() -> None:
    assert summarise([START, finish(500)]) == {
        "result": "ok",
        "reason": "",
        "steps": 500,
        "world": {"initial": 3, "final": 3, "spares_left": 2},
        "restarts": 0,
        "requeue": None,
        "restored_step": None,
        "checkpoints": [],
        "failures": [],
        "stragglers": [],
        "replacements": [],
        "relaunches": [],
        "resizes": [],
        "params_sha256": "abc",
        "seconds": 60.123,
    }


def test_a_run_that_was_asked_to_end_and_requeued_is_told() -> None:
    start = Event("start", 0, (0,), 0, 1000.0, {"active": 1, "spares": 0, "restarts": 2})
    asked = Event("interrupted", 7, (), 0, 1030.0, {"reason": "SIGUSR1", "newest": 7})
    requeue = Event("requeue", 7, (), 0, 1031.0, {"requeued": True, "why": "", "excluded": ["n1"]})
    told = summarise([start, asked, requeue])
    assert (told["result"], told["reason"], told["steps"]) == ("interrupted", "SIGUSR1", 7)
    assert (told["restarts"], told["requeue"]) == (2, requeue.detail)
    assert told["seconds"] == 30


def test_checkpoints_are_told() -> None:
    told = summarise(
        [
            START,
            Event("damaged", 90, (), 0, 1001.0, {"why": "bits"}),
            Event("restore", 80, (), 0, 1002.0, {"path": "/c"}),
            Event("checkpoint", 100, (), 0, 1003.0, {"path": "/d", "seconds": 0.1}),
            finish(500),
        ]
    )
    assert told["restored_step"] == 80
    assert told["checkpoints"] == [100]


def test_a_failure_recovered_from_is_told_with_what_it_cost() -> None:
    told = summarise(
        [
            START,
            failure(1, 40, 1),
            Event("detection", 40, (1,), 1),
            Event("adoption", 40, (1,), 1),
            resume(1, 40, "substitute", 3, 1, lost_steps=1),
            recovered(1, 41, 0.25),
            finish(500),
        ]
    )
    assert told["result"] == "ok"
    assert told["world"] == {"initial": 3, "final": 3, "spares_left": 1}
    assert told["failures"] == [
        {
            "step": 40,
            "ranks": [1],
            "cause": "killed by SIGKILL",
            "action": "substitute",
            "detect_s": 0.002,
            "recover_s": 0.1,
            "stall_s": 0.25,
            "lost_steps": 1,
            "role": "active",
            "phases": {"agree": 0.01},
        }
    ]


def test_failures_at_the_same_time_share_one_recovery_and_those_of_another_time_do_not() -> None:
    told = summarise(
        [
            START,
            failure(1, 40, 1),
            failure(1, 40, 2, cause="exit code 1"),
            resume(1, 40, "substitute", 3, 0),
            recovered(1, 41, 0.25),
            failure(2, 90, 2),
            resume(2, 90, "shrink", 2, 0),
            recovered(2, 91, 0.5),
            finish(500),
        ]
    )
    assert [
        (f["ranks"], f["cause"], f["action"], f["recover_s"], f["stall_s"])
        for f in told["failures"]
    ] == [
        ([1], "killed by SIGKILL", "substitute", 0.1, 0.25),
        ([2], "exit code 1", "substitute", 0.1, 0.25),
        ([2], "killed by SIGKILL", "shrink", 0.2, 0.5),
    ]
    assert told["world"] == {"initial": 3, "final": 2, "spares_left": 0}


def test_a_world_that_shrank_is_told_by_its_last_size() -> None:
    start = Event("start", 0, (0, 1, 2), 0, 1000.0, {"active": 3, "spares": 0})
    shrink = Event("shrink", 7, (1,), 1, 1011.0, {"from": 3, "to": 2})
    told = summarise([start, failure(1, 7, 1), shrink, resume(1, 7, "shrink", 2, 0), finish(9)])
    assert told["world"] == {"initial": 3, "final": 2, "spares_left": 0}
    assert told["failures"][0]["action"] == "shrink"


def test_losing_a_spare_costs_a_spare_and_no_rank() -> None:
    told = summarise([START, failure(1, 7), resume(1, 7, "none", 3, 1), finish(9)])
    assert told["result"] == "ok"
    assert told["world"] == {"initial": 3, "final": 3, "spares_left": 1}
    assert [(f["role"], f["ranks"], f["action"]) for f in told["failures"]] == [
        ("spare", [], "none")
    ]


def test_a_failure_nobody_recovered_from_has_no_times() -> None:
    failed = Event("failed", 40, (), 0, 1030.0, {"reason": "too few ranks are left"})
    told = summarise([START, failure(1, 40, 0), failed])
    assert told["result"] == "failed"
    assert told["reason"] == "too few ranks are left"
    assert told["steps"] == 40
    assert told["seconds"] == 30.0
    assert told["params_sha256"] is None
    (only,) = told["failures"]
    assert (only["action"], only["recover_s"], only["stall_s"]) == ("none", None, None)
    assert only["detect_s"] == 0.002


def test_a_stall_whose_end_nobody_saw_is_not_told() -> None:
    told = summarise([START, failure(1, 40, 1), resume(1, 40, "substitute", 3, 1)])
    assert told["failures"][0]["recover_s"] == 0.1
    assert told["failures"][0]["stall_s"] is None


def test_a_run_that_says_no_end_was_ended_from_outside() -> None:
    told = summarise([START, failure(1, 40, 1), resume(1, 39, "substitute", 3, 1)])
    assert (told["result"], told["reason"]) == ("failed", "the run was ended from outside")
    assert told["steps"] == 40
    assert told["seconds"] is None
    assert told["params_sha256"] is None


def test_a_run_that_never_began_has_a_summary_too() -> None:
    told = summarise([Event("failed", 0, detail={"reason": "ranks did not start MPI"})])
    assert (told["result"], told["steps"], told["seconds"]) == ("failed", 0, None)
    assert told["world"] == {"initial": 0, "final": 0, "spares_left": 0}
    assert summarise([])["result"] == "failed"


# -- the log -----------------------------------------------------------------------------------

words = st.text(max_size=8)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
any_event = st.builds(
    Event,
    words,
    st.integers(0, 1 << 40),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.integers(0, 99),
    st.floats(0, 1e10),
    st.dictionaries(words, plain | st.dictionaries(words, plain, max_size=2), max_size=2),
)


@given(st.lists(st.lists(any_event, max_size=3), max_size=4))
def test_what_is_written_in_any_portions_is_read_back_the_same(portions: list[list[Event]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "events.jsonl"
        for portion in portions:
            log.append(path, portion)
        written = [event for portion in portions for event in portion]
        assert list(log.read(path)) == written
        lines = path.read_bytes().splitlines() if path.exists() else []
        assert [json.loads(line)["kind"] for line in lines] == [e.kind for e in written]


@given(st.data(), st.lists(any_event, min_size=1, max_size=4))
def test_of_a_log_torn_anywhere_the_whole_lines_are_read(
    data: st.DataObject, written: list[Event]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "events.jsonl"
        log.append(path, written)
        whole = path.read_bytes()
        kept = data.draw(st.integers(0, len(whole)), "bytes kept")
        path.write_bytes(whole[:kept])
        ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
        # A line that lacks nothing but its end is whole.
        assert list(log.read(path)) == written[: sum(end <= kept for end in ends)]


def test_what_a_successor_writes_after_a_torn_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log.append(path, [START, failure(1, 40, 0)])
    path.write_bytes(path.read_bytes()[:-10])
    successors = [failure(1, 40, 0), resume(1, 40, "substitute", 3, 1)]
    log.append(path, successors)
    assert list(log.read(path)) == [START, *successors]


def test_a_log_that_nobody_has_begun_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(log.read(path)) == []
    log.append(path, [])
    assert not path.exists()


# -- the run directory -------------------------------------------------------------------------


def test_a_new_run_clears_what_a_former_one_left_and_nothing_else(tmp_path: Path) -> None:
    former = RunDirectory(tmp_path / "runs" / "one")
    former.create(4, "")
    former.append([START])
    former.write_ranks({"epoch": 0})
    former.write_summary({"result": "ok"})
    for world in range(4):
        former.log_file(world).write_text("former or just begun")
    (former.path / ".ranks.json.4711").write_text("{")
    (former.path / "notes.txt").write_text("mine")
    (former.path / "logs" / "notes.txt").write_text("mine")

    run = RunDirectory(former.path)
    run.create(2, "")
    assert run.events() == []
    left = {str(file.relative_to(run.path)) for file in run.path.rglob("*") if file.is_file()}
    # The processes of this run may have begun their logs already.
    assert left == {"logs/rank-0.log", "logs/rank-1.log", "notes.txt", "logs/notes.txt"}


def test_what_is_replaced_is_replaced_as_a_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create(1, "")
    run.write_ranks({"epoch": 0, "ranks": ["x" * 10_000]})
    with run.ranks_file.open() as reader:
        run.write_ranks({"epoch": 1, "ranks": []})
        # Who has begun to read the old one reads it to its end.
        assert json.load(reader)["epoch"] == 0
    (run.path / ".ranks.json.4711").write_text("{")
    run.write_summary({"result": "ok"})
    assert json.loads(run.ranks_file.read_text()) == {"epoch": 1, "ranks": []}
    assert json.loads(run.summary_file.read_text()) == {"result": "ok"}
    assert sorted(e.name for e in tmp_path.iterdir()) == [
        "laps",
        "logs",
        "ranks.json",
        "summary.json",
    ]


def test_a_directory_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        RunDirectory(tmp_path / "file" / "run").create(1, "1.0.0")


def test_one_task_calls_a_launch_off_and_no_former_launch_counts(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.call_off("7.0.0")
    run.create(2, "7.0.1")
    assert not run.called_off("7.0.0")
    assert run.call_off("7.0.1")
    assert not run.call_off("7.0.1")
    # Rank 0 may be late, and make the directory when another task has failed already.
    run.create(2, "7.0.1")
    assert run.called_off("7.0.1")
