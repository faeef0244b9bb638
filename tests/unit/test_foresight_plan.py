"""The simulator against closed forms, against itself, and through the command."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpcft.ckpt import interval as intervals
from hpcft.cli import main
from hpcft.cli.quantities import seconds, values
from hpcft.errors import UsageError
from hpcft.foresight.campaigns import CAMPAIGNS, judge
from hpcft.foresight.forecast import best, simulate, sweep, with_interval
from hpcft.foresight.optimum import daly_goodput, young
from hpcft.foresight.scenario import (
    DAY,
    HOUR,
    Hazards,
    Machine,
    Saves,
    Scenario,
    Site,
    Stack,
    Tier,
)
from hpcft.foresight.simulator import live
from hpcft.foresight.trace import Strike, strikes
from hpcft.report.record import Chapter
from hpcft.telemetry.events import Event, Times, failure
from hpcft.telemetry.rundir import RunDirectory

_RESTART = Stack(in_place=False, detect=0.0, relaunch=120.0, start=0.0, short="wait")


def _restarting(interval: float, cost: float, mtbf: float, days: float = 60) -> Scenario:
    hazards = Hazards(node=math.inf, job=mtbf)
    saves = Saves(file=Tier(interval, cost))
    return Scenario(Machine(10), days * DAY, hazards, saves, _RESTART)


@pytest.mark.parametrize(("interval", "cost"), [(600, 30), (3600, 60), (1200, 200)])
def test_restarts_are_as_dalys_expected_time(interval: float, cost: float) -> None:
    found = simulate(_restarting(interval, cost, 5 * HOUR), runs=32, seed=1).part
    exact = daly_goodput(interval, cost, 120.0, 5 * HOUR)
    # Two of the margins: 95 % of seeds lie within one, and the end of a life cuts a cycle.
    assert abs(found.mean - exact) < 2 * found.margin
    assert found.margin < 0.01


def test_small_losses_are_as_metas_expected_ratio() -> None:
    """Kokolis et al. 2025: (1 - N r (u + t / 2)) / (1 + w / t), for small losses."""
    interval, cost, mtbf = 1800.0, 20.0, 40 * HOUR
    found = simulate(_restarting(interval, cost, mtbf, 200), runs=32, seed=3).part
    ratio = (1 - (120 + interval / 2) / mtbf) / (1 + cost / interval)
    assert abs(found.mean - ratio) < 2 * found.margin + 5e-4


def test_a_shortage_of_spares_is_as_the_binomial_of_independent_machines() -> None:
    up, down, nodes, spares = 50 * DAY, 2 * DAY, 40, 2
    scenario = Scenario(
        Machine(nodes, spares),
        2000 * DAY,
        Hazards(node=up),
        Saves(None, None),
        Stack(step=0, detect=0, adopt=0, shrink=0, resize=0, start=0),
        Site(repair=down, soft=0.0),
    )
    found = simulate(scenario, runs=16, seed=2).short
    exact = 1 - stats.binom.cdf(spares, nodes + spares, down / (up + down))
    assert abs(found.mean - exact) < 2 * found.margin
    assert found.margin < 0.05 * exact + 0.01


def test_the_best_interval_is_about_dalys() -> None:
    scenario = _restarting(600, 60, 4 * HOUR)
    optimum = intervals.optimum(60, 4 * HOUR)
    grid = [optimum * factor for factor in (0.25, 0.5, 1.0, 2.0, 4.0)]
    rows = sweep(lambda interval: with_interval(scenario, interval), grid, 16, 0)
    assert best(rows, lambda found: found.work.mean) == optimum
    assert optimum < young(60, 4 * HOUR)


def test_more_spares_and_a_nearer_tier_help() -> None:
    few = Scenario(
        Machine(64, 0),
        60 * DAY,
        Hazards(node=20 * DAY),
        stack=Stack(sharded=True),
        saves=Saves(Tier(3600, 5)),
    )
    more = replace(few, machine=Machine(64, 6))
    near = replace(few, saves=Saves(Tier(3600, 5), Tier(60, 0.1, 0, 1)))
    base, with_spares, with_near = (simulate(one, 8, 5) for one in (few, more, near))
    assert with_spares.work.low > base.work.high
    assert with_spares.counts["adopted"] > base.counts["adopted"]
    assert with_near.part.low > base.part.high


def test_a_rack_takes_what_is_near_with_it() -> None:
    """A checkpoint on one other node does not survive two lost at once."""
    saves = Saves(Tier(7200, 1), Tier(60, 0.0), near_survives=1)
    alone = Scenario(Machine(64, 16), 30 * DAY, Hazards(node=30 * DAY), saves, Stack(sharded=True))
    racks = replace(alone, hazards=Hazards(node=math.inf, rack=30 * DAY / 16))
    lost = [simulate(one, 8, 5).goodput.again for one in (alone, racks)]
    assert lost[1] > 10 * lost[0]


def test_a_hundred_thousand_ranks_cost_as_much_as_their_failures() -> None:
    """The same failures on a thousandth of the nodes make as many draws, and the same life."""
    big = Scenario(Machine(12_500), 60 * DAY, Hazards(node=math.inf, job=3 * HOUR))
    small = replace(big, machine=Machine(12))
    lives = [live(one, np.random.default_rng(7)) for one in (big, small)]
    assert lives[0] == replace(lives[1], least=12_500)


def test_given_failures_are_played_through_to_the_second() -> None:
    """One that starts all ranks again, 27 s after the first step; a file is there every 10.5 s."""
    scenario = Scenario(
        Machine(3),
        100,
        Hazards(),
        Saves(Tier(10, 0.5)),
        Stack(detect=0.1, relaunch=1.9, start=5, end=4, at_least=3, rejoin=False),
        Site(soft=1, reboot=0),
    )
    life = live(scenario, np.random.default_rng(0), [Strike(32, 1)])
    parts = {name: part for name, part in life.goodput.parts.items() if part}
    # 21 s with two files, 6 s lost; then 62 s: five files, and 9.5 s.
    assert parts == pytest.approx(
        {"starting": 5, "steps": 79.5, "again": 6, "saving": 3.5, "relaunch": 2, "ending": 4}
    )
    assert (life.counts["failures"], life.counts["relaunched"]) == (1, 1)


def test_who_is_back_outside_of_the_run_is_no_spare() -> None:
    scenario = Scenario(
        Machine(3, 1),
        100,
        Hazards(),
        Saves(None, None),
        Stack(rejoin=False),
        Site(soft=1, reboot=0),
    )
    trace = [Strike(70, 1), Strike(75, 1), Strike(80, 1, spare=True), Strike(85, 0)]
    life = live(scenario, np.random.default_rng(0), trace)
    counts = {name: count for name, count in life.counts.items() if count}
    # The spare is gone by then; all that have failed are there again for the relaunch.
    assert counts == {"failures": 3, "adopted": 1, "shrunk": 1, "relaunched": 1}
    assert life.least == 2
    later = live(scenario, np.random.default_rng(0), [*trace, Strike(95, 1, spare=True)])
    assert later.counts["spare_failures"] == 1


def test_a_slow_node_has_the_others_wait() -> None:
    hazards = Hazards(node=math.inf, slow=1.0, slowdown=3, slow_for=1e9)
    scenario = Scenario(Machine(4, ranks_per_node=1), 1e4, hazards, Saves(None, None))
    parts = live(scenario, np.random.default_rng(0)).goodput
    # Of 3 s the slow one computes all, and the others wait for 2.
    assert parts.waiting / (parts.steps + parts.waiting) == pytest.approx(2 / 3 * 3 / 4, abs=1e-3)


_TIMES = st.floats(0, 1e5)
_STRIKES = st.one_of(
    st.none(),
    st.lists(
        st.builds(Strike, st.floats(0, 4 * DAY), st.integers(0, 5), st.booleans()), max_size=20
    ).map(lambda strikes: sorted(strikes, key=lambda strike: strike.at)),
)
_RATES = st.one_of(st.just(math.inf), st.floats(2e3, 1e7))
_TIERS = st.one_of(st.none(), st.builds(Tier, st.floats(1, 1e5), _TIMES, _TIMES, _TIMES))


@settings(max_examples=150, deadline=None)
@given(
    st.builds(Machine, st.integers(1, 50), st.integers(0, 9), st.just(8), st.integers(1, 20)),
    st.builds(
        Hazards,
        node=_RATES.map(lambda mean: mean * 50),
        rack=_RATES,
        job=_RATES,
        shape=st.floats(0.3, 3),
        slow=_RATES.map(lambda mean: mean * 50),
        slowdown=st.floats(1, 3),
        slow_for=_TIMES,
        preempted=_RATES,
    ),
    st.builds(Saves, _TIERS, _TIERS, st.integers(0, 3)),
    st.builds(
        Stack,
        st.booleans(),
        st.booleans(),
        _TIMES,
        st.floats(0, 0.9),
        *[_TIMES] * 7,
        st.sampled_from(("shrink", "wait", "requeue")),
        st.just(0),
        st.integers(1, 8),
        st.booleans(),
    ),
    st.builds(Site, _TIMES, st.floats(0, 1), _TIMES, _TIMES, _RATES, st.just(1.0)),
    _STRIKES,
    st.integers(0, 99),
)
def test_the_parts_of_any_life_sum_up_to_it(
    machine: Machine,
    hazards: Hazards,
    saves: Saves,
    stack: Stack,
    site: Site,
    trace: list[Strike] | None,
    seed: int,
) -> None:
    scenario = Scenario(machine, 3 * DAY, hazards, saves, stack, site).checked()
    life = live(scenario, np.random.default_rng(seed), trace)
    assert math.fsum(life.goodput.parts.values()) == pytest.approx(scenario.seconds)
    assert all(part >= -1e-6 for part in life.goodput.parts.values())
    # Waiting for slower ranks is a part of the work.
    assert -1e-6 <= life.work <= life.goodput.steps + life.goodput.waiting + 1e-6
    assert 1 <= life.least <= machine.nodes
    again = live(scenario, np.random.default_rng(seed), trace)
    assert again == life


def test_published_campaigns_are_met_as_far_as_docs_say() -> None:
    apart = {one.name: abs(judge(one, runs=8).difference) for one in CAMPAIGNS}
    assert len(apart) == 8
    assert max(apart.values()) < 0.02


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2y", 2 * 365.25 * DAY)],
)
def test_times_are_read(text: str, expected: float) -> None:
    assert seconds(text) == expected
    assert math.isinf(seconds("never"))


def test_ranges_are_read() -> None:
    assert values("0..4", float, True) == [0, 1, 2, 3, 4]
    assert values("0..64", float, True)[-1] == 64
    assert len(values("1m..1h", seconds, False)) == 9
    assert values("1m,1h", seconds, False) == [60, 3600]
    for wrong in ("4..0", "..", "0m..1h", "a"):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            values(wrong, seconds, False)


_SMALL = ["plan", "--nodes", "32", "--days", "5", "--mtbf-node", "10d", "--runs", "4"]


def test_the_command_says_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    swept = ["--sweep", "spares=0..2", "--plot", str(page), "--price", "3"]
    assert main.main([*_SMALL, *swept]) == 0
    said = capsys.readouterr().out
    assert "256 ranks on 32 nodes" in said
    assert "goodput" in said
    assert "by Daly" in said
    assert "most work: spares 2" in said
    assert "11,520 for 3,840 node-hours" in said
    text = page.read_text()
    assert 'data-picture="spares"' in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_the_command_says_it_to_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*_SMALL, "--json", "--sweep", "ckpt-every=1m,1h"]) == 0
    said = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert 0.9 < said["part"]["mean"] < 1
    assert said["scenario"]["hazards"]["rack"] is None
    assert [row["value"] for row in said["sweep"]["forecasts"]] == [60, 3600]
    assert said["interval"]["daly"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        ["plan"],
        ["plan", "--nodes", "0"],
        ["plan", "--nodes", "8", "--mtbf-node", "1ms"],
        ["plan", "--nodes", "8", "--days", "inf"],
        ["plan", "--nodes", "8", "--soft", "2"],
        ["plan", "--nodes", "8", "--runs", "1"],
        ["plan", "--nodes", "8", "--sweep", "colour=1..2"],
        ["plan", "--nodes", "8", "--sweep", "spares=9..2"],
        ["plan", "--nodes", "8", "--slowdown", "0.5"],
        ["plan", "--nodes", "8", "--min-nodes", "9"],
    ],
)
def test_wrong_usage_has_a_cause_and_a_remedy(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(wrong) == 2
    assert "; " in capsys.readouterr().err


def test_a_campaign_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match="no end"):
        Scenario(Machine(1), math.inf).checked()


def _measured_run(path: Path) -> None:
    rundir = RunDirectory(path)
    rundir.create(3, "x")
    table = [
        {"logical": n, "world": n, "host": f"n{n}", "pid": 1, "role": "active"} for n in range(2)
    ]
    spare = {"logical": None, "world": 2, "host": "n2", "pid": 1, "role": "spare"}
    rundir.write_ranks({"epoch": 0, "ranks": [*table, spare]})
    resume = {"action": "substitute", "recover_s": 0.25, "lost_steps": 0, "phases": {}}
    rundir.append(
        [
            Event("start", 0, time=1000.0, detail={"active": 2, "spares": 1}),
            Event("checkpoint", 50, time=1050.0, detail={"path": "x", "seconds": 3.0}),
            failure(60, 1, 1, 1, "n1", "killed by SIGSEGV", Times(1060.0, 1060.5)),
            Event("resume", 60, (1,), 1, 1061.0, resume | {"active": 2, "spares": 0}),
            Event("finish", 200, time=1201.0),
        ]
    )


def test_times_come_from_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    _measured_run(tmp_path / "run")
    assert main.main(["plan", "--from", str(tmp_path / "run"), "--runs", "2", "--json"]) == 0
    scenario = json.loads(capsys.readouterr().out)["scenario"]
    assert scenario["machine"] == {"nodes": 2, "spares": 1, "ranks_per_node": 1, "rack": 16}
    assert scenario["stack"]["detect"] == 0.5
    # From when the failure is known until the ranks go on.
    assert scenario["stack"]["adopt"] == 0.5
    assert scenario["stack"]["step"] == pytest.approx(1.0, abs=0.01)
    assert scenario["saves"]["file"]["write"] == 3.0
    said = ["plan", "--from", str(tmp_path / "run"), "--nodes", "9", "--detect", "2s", "--json"]
    assert main.main([*said, "--runs", "2"]) == 0
    scenario = json.loads(capsys.readouterr().out)["scenario"]
    assert (scenario["machine"]["nodes"], scenario["stack"]["detect"]) == (9, 2.0)


def test_a_runs_failures_are_played_through_under_another_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    _measured_run(tmp_path / "run")
    asked = ["plan", "--trace", str(tmp_path / "run"), "--start", "1s", "--runs", "2"]
    assert main.main([*asked, "--json", "--sweep", "spares=0,1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["trace"] == [{"at": 60.0, "nodes": 1, "spare": False}]
    assert said["goodput"]["whole"] == pytest.approx(201.0)
    assert said["scenario"]["hazards"]["node"] is None
    counts = [one["counts"] for one in said["sweep"]["forecasts"]]
    assert [(one["adopted"], one["shrunk"]) for one in counts] == [(0, 1), (1, 0)]
    assert main.main(asked) == 0
    assert "the failures           1 of the run" in capsys.readouterr().out


def test_processes_that_fail_together_are_a_node() -> None:
    def lost(time: float, epoch: int, logical: int | None, host: str) -> Event:
        return failure(1, epoch, logical, 0, host, "", Times(time, time))

    events = (
        Event("start", 0, time=100.0),
        *(lost(110.0 + n / 10, 1, n, "a") for n in range(4)),
        Event("resume", 1, epoch=1, time=111.0),
        lost(120.0, 2, 0, "b"),
        lost(120.1, 2, None, "c"),
        Event("relaunch", 1, time=121.0),
        lost(125.0, 1, 0, "a"),
        Event("resume", 1, epoch=1, time=126.0),
        Event("relaunch", 1, time=130.0),
    )
    found = strikes([Chapter(Path(), 90.0, 140.0, events)], 4)
    assert found == (
        Strike(20, 1),
        Strike(30, 1),
        Strike(pytest.approx(30.1), 1, spare=True),
        Strike(35, 1),
        Strike(40, 0),
    )
    assert next(one.nodes for one in strikes([Chapter(Path(), 90.0, 140.0, events)], 1)) == 4


def test_a_run_that_never_trained_has_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    rundir = RunDirectory(tmp_path / "run")
    rundir.create(1, "x")
    rundir.append([Event("failed", 0, detail={"reason": "no MPI"})])
    assert main.main(["plan", "--from", str(tmp_path / "run")]) == 1
    assert "nothing to tell" in capsys.readouterr().err
