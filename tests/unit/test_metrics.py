"""A run's metrics: made from its files, whatever state those are in; printed, written, served."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parsed

from hpcft.cli.main import main
from hpcft.errors import UsageError
from hpcft.telemetry import laps
from hpcft.telemetry.address import Address
from hpcft.telemetry.events import Event, Times, failure
from hpcft.telemetry.laps import Lap, Tally
from hpcft.telemetry.rundir import RunDirectory
from hpcft.watch.metrics import kind_of


def lap(rank: int, first: int, last: int, world: int | None = None) -> Lap:
    count = last - first + 1
    where = rank if world is None else world
    return Lap(where, rank, 0, first, last, 0, 1, 2.0 * count, 0.5 * count, 0.25 * count, {0: 1})


@pytest.fixture
def rundir(tmp_path: Path) -> RunDirectory:
    """Of a run that trains, and has lost rank 0 to a node and a spare to SIGKILL."""
    rundir = RunDirectory(tmp_path / "run 7")
    rundir.create(0, "")
    resume = {"action": "substitute", "active": 2, "spares": 0, "recover_s": 0.5, "lost_steps": 3}
    times = Times(1010, 1011)
    rundir.append(
        [
            Event("start", 0, (0, 1), 0, 1000, {"active": 2, "spares": 2}),
            Event("checkpoint", 10, time=1005, detail={"path": "/none", "seconds": 1.5}),
            Event("checkpoint", 20, time=1009, detail={"path": "/none", "seconds": 2.5}),
            Event("save failed", 20, detail={"why": "full"}),
            failure(20, 1, 0, 0, "n3", "node n3 silent for 0.91 s", times),
            Event("resume", 20, (0, 1), 1, 1012, {**resume, "phases": {}}),
            Event("recovered", 21, (), 1, 1013, {"stall_s": 2.5}),
            failure(25, 1, None, 3, "n3", "killed by SIGKILL", times),
            Event("straggler", 25, (1,), 1, 1014, {"world": 1, "host": "n4", "factor": 2.5}),
            Event("replaced", 25, (1,), 2, 1015, {"world": 3, "slow_world": 1}),
            Event("relaunch", 25, (0, 1), detail={"reason": "all failed"}),
            Event("spare cooled", 25, detail={"world": 4, "host": "n4"}),
        ]
    )
    status = {"time": 1020.0, "step": 24, "stepped": 1019.0, "rate": 2.5, "epoch": 0}
    rundir.write_status({**status, "metrics": {"loss": 0.5, 'odd "one"': None}})
    ranks = [{"role": "active"}, {"role": "active"}]
    ranks += [{"role": "spare", "world": world} for world in (4, 5)]
    rundir.write_ranks({"epoch": 1, "ranks": ranks})
    # Rank 0 was process 0, and then process 2, which did a step again.
    laps.append(rundir.laps_folder, [lap(0, 1, 20), lap(0, 20, 24, world=2), lap(1, 1, 24)])
    return rundir


def samples(text: str) -> dict[str, float]:
    """By name and labels, but that of the run."""
    found = {}
    for family in parsed(text):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "run"}
            found[sample.name + "".join(f" {key}={labels[key]}" for key in sorted(labels))] = (
                sample.value
            )
    return found


def test_all_there_is_to_say(rundir: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", str(rundir.path)]) == 0
    text = capsys.readouterr().out
    found = samples(text)
    nan = found.pop('hpcft_metric name=odd "one"')
    assert nan != nan
    assert found == {
        "hpcft_run_state state=starting": 0,
        "hpcft_run_state state=training": 1,
        "hpcft_run_state state=ok": 0,
        "hpcft_run_state state=interrupted": 0,
        "hpcft_run_state state=failed": 0,
        "hpcft_step": 24,
        "hpcft_steps_done_total": 25,
        "hpcft_steps_per_second": 2.5,
        "hpcft_status_timestamp_seconds": 1020,
        "hpcft_last_step_timestamp_seconds": 1019,
        "hpcft_start_timestamp_seconds": 1000,
        "hpcft_ranks_training": 2,
        "hpcft_spares_left": 2,
        "hpcft_spares_cold": 1,
        "hpcft_failures_total action=substitute cause=node silent": 1,
        "hpcft_failures_total action=none cause=killed by SIGKILL": 1,
        "hpcft_recovery_seconds_count": 1,
        "hpcft_recovery_seconds_sum": 0.5,
        "hpcft_stall_seconds_count": 1,
        "hpcft_stall_seconds_sum": 2.5,
        "hpcft_lost_steps_total": 3,
        "hpcft_stragglers_total": 1,
        "hpcft_replacements_total": 1,
        "hpcft_relaunches_total": 1,
        "hpcft_resizes_total": 0,
        "hpcft_checkpoints_total result=committed": 2,
        "hpcft_checkpoints_total result=failed": 1,
        "hpcft_checkpoints_total result=skipped": 0,
        "hpcft_checkpoint_seconds_count": 2,
        "hpcft_checkpoint_seconds_sum": 4,
        "hpcft_last_checkpoint_step": 20,
        "hpcft_last_checkpoint_timestamp_seconds": 1009,
        "hpcft_rank_seconds_total rank=0 spent=computing": 50,
        "hpcft_rank_seconds_total rank=0 spent=waiting": 12.5,
        "hpcft_rank_seconds_total rank=0 spent=saving": 6.25,
        "hpcft_rank_seconds_total rank=1 spent=computing": 48,
        "hpcft_rank_seconds_total rank=1 spent=waiting": 12,
        "hpcft_rank_seconds_total rank=1 spent=saving": 6,
        "hpcft_metric name=loss": 0.5,
    }
    for family in parsed(text):
        assert family.documentation
        assert all(sample.labels["run"] == "run 7" for sample in family.samples)
    # Every figure is described.
    told = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name in {re.sub(r"_(sum|count)$", "", key.split()[0]) for key in found}:
        assert f"`{name}" in told, name


def test_as_json(rundir: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", str(rundir.path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    loss = {"name": "hpcft_metric", "labels": {"run": "run 7", "name": "loss"}, "value": 0.5}
    assert loss in rows
    assert [row["value"] for row in rows if row["labels"].get("name") == 'odd "one"'] == [None]


def test_a_run_that_has_failed_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    assert main(["metrics", str(tmp_path / "run")]) == 0
    found = samples(capsys.readouterr().out)
    assert found["hpcft_run_state state=starting"] == 1
    assert found["hpcft_step"] == found["hpcft_ranks_training"] == 0
    assert not any(key.startswith("hpcft_failures_total") for key in found)


def test_a_run_that_has_ended(rundir: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    rundir.write_summary({"result": "failed", "reason": "", "steps": 25, "failures": []})
    assert main(["metrics", str(rundir.path)]) == 0
    found = samples(capsys.readouterr().out)
    assert found["hpcft_run_state state=failed"] == 1
    assert found["hpcft_run_state state=training"] == 0
    assert found["hpcft_step"] == 25
    assert found["hpcft_steps_per_second"] == found["hpcft_ranks_training"] == 0


@pytest.mark.parametrize("content", ["", "{", "7", '{"step": 1}'])
def test_what_is_no_status_is_told(
    rundir: RunDirectory, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rundir.status_file.write_text(content)
    assert main(["metrics", str(rundir.path)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert f"{rundir.path} cannot be read" in told.err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", str(tmp_path)]) == 2
    assert "not the directory of a run" in capsys.readouterr().err


def test_a_file_is_replaced_as_a_whole(
    rundir: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "textfiles"
    folder.mkdir()
    file = folder / "run.prom"
    file.write_text("before")
    before = file.stat().st_ino
    assert main(["metrics", str(rundir.path), "--output", str(file)]) == 0
    assert samples(file.read_text())["hpcft_step"] == 24
    assert file.stat().st_ino != before
    assert list(folder.iterdir()) == [file]
    assert main(["metrics", str(rundir.path), "--output", str(folder / "no" / "run.prom")]) == 1
    assert "cannot be written: No such file or directory" in capsys.readouterr().err
    assert list(folder.iterdir()) == [file]


@contextmanager
def served(rundir: RunDirectory, address: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "hpcft.cli.main", "metrics", str(rundir.path)]
    command += ["--serve", "127.0.0.1:0", "--address", str(address)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[-1]
        assert url.startswith("http://127.0.0.1:"), line
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_serving(rundir: RunDirectory, tmp_path: Path) -> None:
    address = tmp_path / "metrics.json"

    def got() -> dict[str, float]:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return samples(answer.read().decode())

    with served(rundir, address) as url:
        first = got()
        assert json.loads(address.read_text()) == {"url": url}
        assert (first["hpcft_readable"], first["hpcft_steps_done_total"]) == (1, 25)
        laps.append(rundir.laps_folder, [lap(0, 25, 30, world=2)])
        assert got()["hpcft_steps_done_total"] == 31
        status = rundir.status_file.read_text()
        rundir.status_file.write_text("torn")
        assert got() == {"hpcft_readable": 0}
        rundir.status_file.write_text(status)
        assert got()["hpcft_step"] == 24
        # A second one at the same port says so, and takes nothing away.
        port = url.split(":")[2].split("/")[0]
        command = [sys.executable, "-m", "hpcft.cli.main", "metrics", str(rundir.path)]
        other = subprocess.run(
            [*command, "--serve", f"127.0.0.1:{port}", "--address", str(address)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert other.returncode == 1
        assert "nothing can be served" in other.stderr
        assert "give another port" in other.stderr
        with pytest.raises(UsageError, match="nothing can listen there: Address already in use"):
            Address("127.0.0.1", int(port)).require_free("--metrics-port")
    assert not address.exists()
    with pytest.raises(urllib.error.URLError):
        got()


some_laps = st.lists(
    st.builds(
        lambda world, rank, first, count: lap(rank, first, first + count, world),
        *(st.integers(0, 2), st.integers(0, 2), st.integers(1, 50), st.integers(0, 50)),
    )
)


@given(st.lists(some_laps, max_size=5), st.integers(0, 30))
def test_a_tally_is_the_sum_however_it_was_read(written: list[list[Lap]], torn: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tally = Tally(folder)
        for part in written:
            laps.append(folder, part)
            # What is being written, a line of it, is read by halves.
            half = [lap(9, 1, 1, world=9)]
            laps.append(folder, half)
            file = folder / "rank-9.jsonl"
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) - torn])
            tally.renew()
            file.write_bytes(whole)
        tally.renew()
        steps = Counter[int]()
        for one in laps.read(folder):
            steps[one.rank] += one.steps
        assert {rank: spent.steps for rank, spent in tally.by_rank.items()} == steps
        # Another run in the same directory.
        for file in folder.iterdir():
            file.unlink()
        laps.append(folder, [lap(0, 1, 1)])
        tally.renew()
        assert {rank: spent.steps for rank, spent in tally.by_rank.items()} == {0: 1}


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        ("killed by SIGKILL", "killed by SIGKILL"),
        ("out of memory: killed by the kernel (SIGKILL)", "out of memory"),
        ("exit code 1: ValueError: for 3 s", "exit code 1"),
        ("stuck: no step for 300 s", "stuck"),
        ("stuck in a recovery for 10 s", "stuck in a recovery"),
        ("node n3.site lost", "node lost"),
        ("node n3 silent for 0.91 s", "node silent"),
        ("stopped (SIGSTOP)", "stopped (SIGSTOP)"),
        ("", "unknown"),
    ],
)
def test_kinds_of_causes(cause: str, kind: str) -> None:
    assert kind_of(cause) == kind


@pytest.mark.parametrize(
    ("text", "address"),
    [("9100", Address("0.0.0.0", 9100)), ("127.0.0.1:0", Address("127.0.0.1", 0))],
)
def test_an_address(text: str, address: Address) -> None:
    assert Address.parse("--serve", text) == address


@pytest.mark.parametrize("text", ["", "x", "-1", "65536", "n1:", "1.5", "²"])
def test_what_is_no_port(text: str) -> None:
    with pytest.raises(UsageError, match="is no port"):
        Address.parse("--serve", text)
