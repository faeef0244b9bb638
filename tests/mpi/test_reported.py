"""A report on a training that loses a rank while another is slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from training import Training, wait_for

from hpcft.cli.main import main

pytestmark = pytest.mark.mpi


def test_a_lost_rank_and_a_slow_one_are_reported(
    launch: Callable[..., Training], capsys: pytest.CaptureFixture[str]
) -> None:
    run = launch("--nproc", "3", "--spares", "1", program=["--steps", "90", "--slow", "1"])
    name = str(run.run_dir)

    def told() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["report", name, "--json"]) == 0
        story: dict[str, Any] = json.loads(capsys.readouterr().out)
        parts = dict(story["goodput"])
        whole = parts.pop("whole")
        del parts["measured"], parts["part"]
        assert sum(parts.values()) == pytest.approx(whole)
        assert min(parts.values()) >= 0
        return story

    run.wait_for_step(30)
    # While it runs.
    story = wait_for("laps", lambda: (s := told())["ranks"] and s)
    assert (story["state"], story["ended"]) == ("training", False)
    assert "under way" in story["words"][0]
    victim = run.entry(2)
    run.send(2)
    run.finish()

    story = told()
    assert (story["state"], story["step"]) == ("ok", 90)
    (failure,) = (one for one in story["incidents"] if one["kind"] == "failure")
    assert failure["cause"] == "killed by SIGKILL"
    assert failure["then"] == "a spare took over"
    assert failure["stall_s"] > 0
    assert story["goodput"]["starting"] > 0
    assert story["goodput"]["recovery"] > 0
    assert story["goodput"]["steps"] > 0
    # The others have waited for the slow one.
    assert story["goodput"]["waiting"] > 0
    assert 1 in {slow["rank"] for slow in story["stragglers"]}
    rows = {row["name"]: row for row in story["timeline"]["rows"]}
    assert [stay["world"] for stay in rows["rank 2"]["stays"]] == [victim["world"], 3]
    assert {mark["kind"] for mark in rows["rank 2"]["marks"]} >= {"failure", "adoption"}
    (loss,) = story["curves"]
    assert loss["name"] == "loss"
    assert loss["points"][-1]["step"] == 90

    assert main(["report", name]) == 0
    page = (run.run_dir / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(run.run_dir / "report.html")
    assert page.count('data-mark="adoption"') == 1
    assert story["words"][0] in page
