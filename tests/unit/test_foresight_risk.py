"""Failure rates: against closed forms and known truths, from the records of each source."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpcft.cli import main
from hpcft.foresight import aging, signals
from hpcft.foresight.evidence import of_run, of_slurm, records
from hpcft.foresight.rates import PRIOR_FAILURES, PRIOR_HOURS, Seen, estimate
from hpcft.launch import history
from hpcft.slurm import records as slurm
from hpcft.telemetry import uptime
from hpcft.telemetry.events import Event, Times, failure
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.uptime import Stretch, kind_of, stretches

_HOUR = 3600.0


def test_without_evidence_the_prior_is_what_is_known() -> None:
    rate = estimate([]).node
    prior = stats.gamma(PRIOR_FAILURES, scale=1 / PRIOR_HOURS)
    assert rate.mean == pytest.approx(prior.mean(), rel=0.1)
    assert rate.low == pytest.approx(prior.ppf(0.05), rel=0.3)
    assert rate.high == pytest.approx(prior.ppf(0.95), rel=0.1)


def test_failures_of_unknown_nodes_are_conjugate() -> None:
    rate = estimate([], Seen("", 30, 60_000.0)).node
    exact = stats.gamma(PRIOR_FAILURES + 30, scale=1 / (PRIOR_HOURS + 60_000))
    assert rate.mean == pytest.approx(exact.mean(), rel=0.05)
    assert rate.low == pytest.approx(exact.ppf(0.05), rel=0.05)
    assert rate.high == pytest.approx(exact.ppf(0.95), rel=0.05)


def test_a_bad_node_stands_out_and_three_failures_by_chance_do_not() -> None:
    chance = np.random.default_rng(0).poisson(1.0, 100)
    many = [Seen(f"n{n}", int(k), 2000.0) for n, k in enumerate(chance)]
    bad = estimate([*many, Seen("lemon", 20, 2000.0)]).nodes
    assert [one.seen.node for one in bad if one.stands_out] == ["lemon"]
    assert bad[0].seen.node == "lemon"
    few = estimate([Seen("a", 1, 100.0), Seen("b", 0, 100.0), Seen("c", 0, 100.0)]).nodes
    assert not any(one.stands_out for one in few)


def test_the_true_rate_is_in_nine_intervals_of_ten() -> None:
    """With rates drawn from the prior, which is what an interval promises."""
    rng = np.random.default_rng(5)
    within = 0
    for _ in range(60):
        rate = rng.gamma(PRIOR_FAILURES, 1 / PRIOR_HOURS)
        seen = [Seen(f"n{n}", int(rng.poisson(rate * 1000)), 1000.0) for n in range(20)]
        found = estimate(seen).node
        within += found.low <= rate <= found.high
    # Of 60, 49 or more are 99 % certain if each is 90 %.
    assert within >= stats.binom.ppf(0.005, 60, 0.9)


def test_a_job_meets_what_the_rates_say() -> None:
    rates = estimate([], Seen("", 100_000, 500_000_000.0))
    chances = rates.job(64, 100)
    expected = 64 * 100 * 2e-4
    assert chances.expected.mean == pytest.approx(expected, rel=0.1)
    assert chances.any_.mean == pytest.approx(1 - np.exp(-expected), rel=0.1)
    total = sum(chances.exactly(number).mean for number in range(30))
    assert total == pytest.approx(1)
    low, high = chances.between
    assert low <= expected <= high


def test_signs_of_trouble_raise_a_nodes_rate_alone() -> None:
    base = estimate([Seen("a", 1, 1000.0), Seen("b", 1, 1000.0)])
    raised = base.raised({"a": 3.0, "new": 10.0})
    rates = {one.seen.node: one.rate.mean for one in raised.nodes}
    before = {one.seen.node: one.rate.mean for one in base.nodes}
    assert rates["a"] == pytest.approx(3 * before["a"])
    assert rates["b"] == pytest.approx(before["b"])
    assert rates["new"] > rates["b"]
    assert raised.job(1, 24, ["a"]).expected.mean == pytest.approx(24 * rates["a"])


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.5])
def test_the_shape_is_found_with_half_of_the_times_censored(shape: float) -> None:
    rng = np.random.default_rng(3)
    times = 3000 * rng.weibull(shape, 400)
    ends = 3000 * rng.weibull(shape, 400)
    record = [(float(min(t, c)), bool(t <= c)) for t, c in zip(times, ends, strict=True)]
    found = aging.fit(record)
    assert found.failures + found.censored == 400
    # Four times the 90 % interval's half width are far beyond what luck does.
    reach = 2 * (found.shape.high - found.shape.low)
    assert abs(found.shape.mean - shape) < reach < 1
    if shape == 1.0:
        assert found.odds < 1
    else:
        assert "Weibull distribution fits better" in found.verdict


def test_of_few_failures_no_shape_is_told() -> None:
    assert "too few" in aging.fit([(10.0, True), (0.0, True), (50.0, False)]).verdict


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        ("out of memory: killed by the kernel (SIGKILL)", "memory"),
        ("killed by SIGKILL", "outside"),
        ("killed by SIGTERM", "outside"),
        ("killed by SIGSEGV", "crash"),
        ("exit code 1: ValueError: no", "script"),
        ("stuck: no step for 60 s", "stuck"),
        ("node n3 silent for 0.81 s", "node"),
        ("unknown", "unknown"),
    ],
)
def test_who_is_to_blame(cause: str, kind: str) -> None:
    assert kind_of(cause) == kind


def _failure(time: float, host: str, cause: str) -> Event:
    return failure(1, 0, 0, 0, host, cause, Times(time, time))


def test_a_runs_nodes_work_until_they_fail() -> None:
    ranks = [{"host": "a"}, {"host": "a"}, {"host": "b"}, {"host": "c"}]
    events = [
        _failure(100, "a", "killed by SIGSEGV"),
        _failure(101, "a", "killed by SIGABRT"),
        _failure(200, "b", "node b silent for 0.8 s"),
        _failure(200.1, "b", "node b silent for 0.8 s"),
        _failure(300, "c", "killed by SIGKILL"),
    ]
    found = stretches("r", events, ranks, 0.0, 1000.0)
    told = [(one.node, one.begin, one.end, one.failed) for one in found]
    assert told == [
        ("a", 0, 100, True),
        ("a", 100, 1000, False),
        ("b", 0, 200, True),
        ("c", 0, 300, False),
        ("c", 300, 1000, False),
    ]
    by_node = {one.node: one for one in records(found)}
    assert by_node["b"].hours == pytest.approx(200 / _HOUR)
    assert by_node["c"].failures == 0
    assert by_node["c"].spared == (("killed by SIGKILL", 1),)


_STRETCHES = st.lists(
    st.builds(
        lambda node, begin, length, failed: Stretch("r", node, begin, begin + length, failed),
        st.sampled_from(("a", "b")),
        st.floats(0, 1e6),
        st.floats(0, 1e6),
        st.booleans(),
    ),
    max_size=20,
)


@settings(max_examples=200)
@given(_STRETCHES)
def test_what_is_told_twice_counts_once(found: list[Stretch]) -> None:
    once, twice = records(found), records([*found, *found])
    assert [(r.node, r.hours, r.times) for r in once] == [(r.node, r.hours, r.times) for r in twice]
    for record in once:
        own = [one for one in found if one.node == record.node]
        assert record.hours <= sum(one.hours for one in own) + 1e-6
        assert sum(hours for hours, _ in record.times) == pytest.approx(record.hours, abs=1e-6)
        assert record.failures <= sum(one.failed for one in own)
        assert (record.failures > 0) == any(one.failed for one in own)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1e6)), max_size=30))
def test_any_record_has_rates(record: list[tuple[int, float]]) -> None:
    rates = estimate([Seen(str(n), k, t) for n, (k, t) in enumerate(record)])
    for one in (rates.node, *(node.rate for node in rates.nodes)):
        assert 0 <= one.low <= one.high < np.inf
        assert 0 < one.mean < np.inf


@settings(max_examples=50)
@given(st.lists(st.binary(max_size=80), max_size=10))
def test_a_history_may_be_torn_anywhere(rubbish: list[bytes]) -> None:
    good = Stretch("r", "a", 1.0, 2.0, True, "crash", "killed by SIGSEGV")
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"history-{os.getpid()}.jsonl"
    path.unlink(missing_ok=True)
    uptime.append(path, [good])
    with path.open("ab") as file:
        file.write(b"\n".join(rubbish) + b"\n")
    uptime.append(path, [good])
    try:
        read = list(uptime.read(path))
    finally:
        path.unlink()
    assert read[0] == read[-1] == good
    assert all(line is None or isinstance(line, Stretch) for line in read)


def _entry(rank: int, host: str) -> dict[str, object]:
    return {"logical": rank, "world": rank, "host": host, "pid": 1, "role": "active"}


def _run(path: Path) -> RunDirectory:
    rundir = RunDirectory(path)
    rundir.create(2, "x")
    rundir.write_ranks({"epoch": 0, "ranks": [_entry(0, "n1"), _entry(1, "n2")]})
    start = Event("start", 0, time=1000.0, detail={"active": 2, "spares": 0})
    end = Event("finish", 9, time=9000.0)
    rundir.append([start, _failure(5000.0, "n2", "killed by SIGBUS"), end])
    return rundir


def test_restarts_by_slurm_and_a_run_that_goes_on_count(tmp_path: Path) -> None:
    for name, begin in (("17.0", 1000.0), ("17.0-r1", 6000.0)):
        rundir = RunDirectory(tmp_path / name)
        rundir.create(1, "x")
        rundir.write_ranks({"epoch": 0, "ranks": [_entry(0, "n1")]})
        start = Event("start", 0, time=begin, detail={"active": 1, "spares": 0})
        saved = [Event("checkpoint", n, time=begin + n) for n in range(100)]
        rundir.append([start, *saved, _failure(begin + 2000, "n1", "killed by SIGBUS")])
    path = tmp_path / "17.0-r1"
    ended = [(one.begin, one.end, one.failed) for one in of_run("17.0-r1", path, 5900.0, None)]
    assert ended == [(1000, 3000, True), (5900, 8000, True)]
    goes_on = of_run("17.0-r1", path, 5900.0, 9000.0)
    assert [one.end for one in goes_on] == [3000, 8000, 9000]
    assert of_run("nowhere", tmp_path / "nowhere", None, None) == []


def test_a_run_adds_itself_to_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rundir = _run(tmp_path / "run")
    history.add(rundir)
    file = tmp_path / "site" / "history.jsonl"
    monkeypatch.setenv(uptime.HISTORY, str(file))
    history.add(rundir)
    history.add(rundir)
    assert len(list(uptime.read(file))) == 6
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    asked = ["risk", "--no-slurm", "--no-live", "--json", "--nodes", "2", "--hours", "10"]
    assert main.main(asked) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["failures"] == 1
    assert said["node_hours"] == pytest.approx(2 * 8000 / 3600)
    assert said["nodes"][0]["node"] == "n2"
    assert said["nodes"][0]["causes"] == {"killed by SIGBUS": 1}
    assert main.main([*asked[:3], str(rundir.path)]) == 0
    assert "1 of 1 runs named" in capsys.readouterr().out
    between = 3600 / said["node"]["mean"]
    assert main.main(["plan", "--nodes", "2", "--days", "1", "--risk", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["scenario"]["hazards"]["node"] == pytest.approx(between)
    assert set(said["job"]["spares"]) == {"0.9", "0.99"}
    monkeypatch.setenv(uptime.HISTORY, "/proc/nowhere/history")
    history.add(rundir)
    assert "/proc/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        ["--hours", "0"],
        ["--hours", "nan"],
        ["--nodes", "0"],
        ["--nodes", "1", "--on", "a,b"],
        ["--since", "0"],
        ["--history", "/nowhere"],
        ["no-such-run"],
    ],
)
def test_wrong_usage_has_a_cause_and_a_remedy(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["risk", "--no-slurm", "--no-live", *wrong]) == 2
    assert "; " in capsys.readouterr().err


# As the commands of Slurm 22.05 print them.
_EVENTS = """\
|2026-11-01T00:00:00|Unknown||Cluster registered TRES|
n1|2026-11-02T00:00:00|2026-11-02T06:00:00|DOWN*|Not responding
n2|2026-11-03T00:00:00|Unknown|DRAIN|maintenance of the switch
n3|2026-11-04T00:00:00|2026-11-04T01:00:00|DOWN|Node unexpectedly rebooted
n3|2026-11-05T00:00:00|Unknown|DOWN*|Not responding
"""


def test_slurms_outages_are_failures_unless_somebody_meant_them() -> None:
    outages = slurm.of_outages(_EVENTS)
    assert outages is not None
    # That the node was rebooted unexpectedly is no plan.
    assert [(one.node, one.planned) for one in outages] == [
        ("n1", False),
        ("n2", True),
        ("n3", False),
        ("n3", False),
    ]
    since = time.mktime(time.strptime("2026-11-01T00:00:00", "%Y-%m-%dT%H:%M:%S"))
    found = records(of_slurm(["n1", "n2", "n3", "n4"], outages, since, since + 10 * 86400))
    told = {one.node: (one.failures, round(one.hours)) for one in found}
    assert told == {"n1": (1, 234), "n2": (0, 48), "n3": (2, 95), "n4": (0, 240)}


def test_slurm_without_accounts_says_so() -> None:
    assert slurm.of_outages("Slurm accounting storage is disabled\n") is None
    assert slurm.of_outages("") == []
    assert slurm.of_jobs("") is None


def test_slurms_jobs_are_added_up() -> None:
    text = "COMPLETED|4|3600\nNODE_FAIL|2|1800\nCANCELLED by 0|1|0\nnonsense\n"
    assert slurm.of_jobs(text) == slurm.Jobs(5.0, 1)


def test_slurms_states_have_reasons() -> None:
    text = "n1|idle|none\nn2|down*|Not responding\nn3|drained|a | b\n"
    found = slurm.of_states(text)
    assert found["n1"] == ("idle", "")
    assert found["n3"] == ("drained", "a | b")


@settings(max_examples=100)
@given(st.text())
def test_whatever_slurm_prints_is_no_crash(text: str) -> None:
    slurm.of_outages(text)
    slurm.of_jobs(text)
    slurm.of_states(text)
    signals.kernel("n", text)
    signals.pressure("n", text)
    signals.ecc("n", text)


def test_what_the_kernel_says_of_memory() -> None:
    text = "some avg10=1.0 avg60=2.0 avg300=30.0 total=9\nfull avg10=0.0 avg60=2.0 avg300=11.5 t=1"
    assert signals.pressure("n", text).there is True
    assert signals.pressure("n", text.replace("11.5", "1.5")).there is False
    assert signals.pressure("n", None).there is None


_LOG = """\
3,11,0,-;Out of memory: Killed process 77 (python) total-vm:1kB, anon-rss:1kB
3,12,0,-;Memory cgroup out of memory: Killed process 78 (python) total-vm:1kB
4,13,0,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.
4,14,0,-;NVRM: Xid (PCI:0000:3b:00): 13, Graphics Exception
"""


def test_what_is_in_the_kernels_log() -> None:
    memory, xid = signals.kernel("n", _LOG)
    assert memory.there is True
    assert "1 kills for want of memory, and 1 at the limit" in memory.said
    assert xid.there is True
    assert "[79]" in xid.said
    soft = signals.kernel("n", _LOG.replace(": 79,", ": 31,"))[1]
    assert soft.there is False
    assert [sign.there for sign in signals.kernel("n", None)] == [None, None]
    assert signals.factors([memory, xid]) == {"n": 30.0}


def test_errors_of_gpus_memory() -> None:
    assert signals.ecc("n", "0, 0\n1, 2\n").there is True
    assert signals.ecc("n", "0, 0\n").there is False
    assert signals.ecc("n", "0, [N/A]\n").there is None
    assert signals.ecc("n", None).there is None


def test_this_machine_can_be_looked_at() -> None:
    found = signals.here("me", 0)
    assert {sign.name for sign in found} == {"pressure", "oom", "kernel", "xid", "ecc"}
    assert all(sign.said for sign in found)
