"""What is shown of a rank that was found slow, changed places with a spare, and recovered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from hpcft.cli.main import main
from hpcft.telemetry.events import Event, slow_now
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise

FOUND = {"compute_s": 0.061, "others_s": 0.011, "factor": 5.5, "score": 40.0, "since": 1001.0}
SLOW = Event("straggler", 30, (1,), 0, 1005.0, {"world": 1, "host": "n1", **FOUND})
REPLACED = [
    Event(
        "replaced",
        33,
        (1,),
        1,
        1006.1,
        {"world": 2, "host": "n2", "slow_world": 1, "slow_host": "n1", "seconds": 0.1},
    ),
    Event(
        "resume",
        33,
        (0, 1),
        1,
        1006.1,
        {"action": "replace", "active": 2, "spares": 1, "recover_s": 0.1, "lost_steps": 0}
        | {"attempts": 1, "phases": {}},
    ),
]
OVER = Event("straggler over", 90, (), 1, 1020.0, {"world": 1, "host": "n1"})


@pytest.fixture
def rundir(tmp_path: Path) -> RunDirectory:
    rundir = RunDirectory(tmp_path / "run")
    rundir.create(0, "")
    rundir.append([Event("start", 0, (0, 1), 0, 1000.0, {"active": 2, "spares": 1})])
    return rundir


def table(rundir: RunDirectory, slow_logical: int | None) -> None:
    other = 1 if slow_logical is None else None
    entries = [(0, 0, "n0"), (slow_logical, 1, "n1"), (other, 2, "n2")]
    rundir.write_ranks(
        {
            "epoch": 0,
            "ranks": [
                {
                    "logical": logical,
                    "world": world,
                    "host": host,
                    "pid": 1,
                    "role": "spare" if logical is None else "active",
                }
                for logical, world, host in entries
            ],
        }
    )


def test_who_is_slow_is_seen_at_once(
    rundir: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    table(rundir, 1)
    rundir.append([SLOW])
    assert main(["top", str(rundir.path), "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert {rank["world"]: rank["slow"] for rank in ranks} == {0: None, 1: 5.5, 2: None}
    assert main(["top", str(rundir.path), "--once"]) == 0
    assert "slow, 5.5 times as long as others" in " ".join(capsys.readouterr().out.split())
    assert main(["metrics", str(rundir.path)]) == 0
    slow = [
        (sample.labels["process"], sample.labels["host"], sample.value)
        for family in parsed(capsys.readouterr().out)
        for sample in family.samples
        if sample.name == "hpcft_process_slow"
    ]
    assert slow == [("1", "n1", 5.5)]


def test_who_is_slow_stays_so_as_a_spare_until_it_is_not() -> None:
    assert slow_now([SLOW, *REPLACED]) == {1: SLOW}
    assert slow_now([SLOW, *REPLACED, OVER]) == {}
    assert slow_now([SLOW, Event("relaunch", 40)]) == {}


def test_the_report_tells_of_it(rundir: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    table(rundir, None)
    finish = Event("finish", 100, (), 1, 1030.0, {"params_sha256": None})
    rundir.append([SLOW, *REPLACED, OVER, finish])
    assert main(["report", str(rundir.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [straggler] = [one for one in told["incidents"] if one["kind"] == "straggler"]
    assert straggler["cause"] == "computes 61 ms in a step, the others 11 ms"
    assert straggler["then"] == (
        "became a spare at step 33, process 2 on n2 took over; as fast as the others again"
    )
    rows = {row["name"]: row for row in told["timeline"]["rows"]}
    assert [stay["world"] for stay in rows["rank 1"]["stays"]] == [1, 2]
    assert [mark["kind"] for mark in rows["rank 1"]["marks"]] == ["slow", "adoption"]
    assert [stay["begin"] for stay in rows["spare 1"]["stays"]] == [1006.1]
    assert "A slow rank changed places with a spare once." in told["words"]
    assert "No rank failed." in told["words"]


def test_the_summary_has_the_evidence(rundir: RunDirectory) -> None:
    rundir.append([SLOW, *REPLACED, OVER])
    summary = summarise(rundir.events())
    assert summary["stragglers"] == [
        {"step": 30, "ranks": [1], "world": 1, "host": "n1"}
        | {"compute_s": 0.061, "others_s": 0.011, "factor": 5.5}
    ]
    assert summary["replacements"] == [
        {"step": 33, "ranks": [1], "world": 2, "host": "n2"}
        | {"slow_world": 1, "slow_host": "n1", "seconds": 0.1}
    ]
    assert summary["world"]["spares_left"] == 1
    assert summary["failures"] == []
