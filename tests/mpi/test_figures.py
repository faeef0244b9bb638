"""What a run shows of itself while it goes, and what becomes of it at its end."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import Training, kill_all, launched, wait_for

pytestmark = pytest.mark.mpi


def figures(url: str) -> dict[str, float]:
    """By name, of those without labels, as they are served now; none if they are not."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            families = list(parsed(answer.read().decode()))
    except OSError:
        return {}
    samples = (sample for family in families for sample in family.samples)
    return {sample.name: sample.value for sample in samples if set(sample.labels) == {"run"}}


def failures(run: Training) -> list[str]:
    """What TensorBoard tells of them."""
    folder = run.run_dir / "tensorboard"
    if not folder.exists():
        return []
    board = EventAccumulator(str(folder)).Reload()
    tag = "hpcft/failures/text_summary"
    told = board.Tensors(tag) if tag in board.Tags()["tensors"] else []
    return [event.tensor_proto.string_val[0].decode() for event in told]


def test_figures_outlive_ranks_and_relaunches(
    launch: Callable[..., Training], tmp_path: Path
) -> None:
    until = tmp_path / "until"
    run = launch(
        *("--nproc", "2", "--spares", "1", "--metrics-port", "127.0.0.1:0", "--tensorboard"),
        *("--ckpt-dir", str(tmp_path / "ck"), "--ckpt-every", "5"),
        *("--upload", str(tmp_path / "archive")),
        program=["--steps", "300", "--pace", "0.05", "--until", str(until)],
    )
    url = wait_for("the port", lambda: re.search(r"hpcft: metrics at (\S+)", run.output))[1]

    def shows(name: str, least: float) -> None:
        wait_for(f"{name} of {least}", lambda: figures(url).get(name, -1) >= least)

    shows("hpcft_step", 10)
    assert figures(url)["hpcft_ranks_training"] == 2
    assert figures(url)["hpcft_spares_left"] == 1
    status = run.run_dir / "status.json"
    wait_for("it in status.json", lambda: json.loads(status.read_text())["metrics_url"] == url)
    run.send(0)
    shows("hpcft_recovery_seconds_count", 1)
    assert figures(url)["hpcft_spares_left"] == 0
    wait_for("the failure to be told", lambda: any("rank 0 on" in text for text in failures(run)))
    # So that there is something to go back to.
    shows("hpcft_last_checkpoint_step", 15)
    kill_all(run)
    launched(run, 2)
    shows("hpcft_relaunches_total", 1)
    until.touch()
    summary = run.finish()
    assert summary["steps"] == 300
    assert len(summary["relaunches"]) == 1
    assert figures(url) == {}
    assert not (run.run_dir / "metrics.json").exists()
    # Each step once, but for what the dead had not written yet.
    board = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    steps = [event.step for event in board.Scalars("loss")]
    assert steps == sorted(set(steps))
    assert set(range(200, 301)) <= set(steps)
    assert any("launched again: all ranks failed" in text for text in failures(run))
    # All of it is where it is kept.
    [archived] = (tmp_path / "archive").iterdir()
    assert archived.name == run.run_dir.name
    for file in run.run_dir.rglob("*"):
        if file.is_file():
            assert (archived / file.relative_to(run.run_dir)).read_bytes() == file.read_bytes()


def test_a_run_that_fails_is_uploaded_and_fails(
    launch: Callable[..., Training], tmp_path: Path
) -> None:
    place = tmp_path / "archive"
    run = launch("--nproc", "1", "--upload", str(place), program=["--raise-at", "-1", "--no-such"])
    code = run.process.wait(120)
    assert code not in (0, 75)
    assert "--no-such" in (place / run.run_dir.name / "logs" / "rank-0.log").read_text()
    assert "hpcft: uploaded" in run.output


def test_the_place_is_tried_before_anything_is_touched(
    launch: Callable[..., Training], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    run = launch("--nproc", "1", "--upload", str(tmp_path / "file" / "archive"))
    run.wait(2)
    assert "cannot be written to" in run.output
    assert not run.run_dir.exists()


def test_ctrl_c_ends_an_upload_and_the_exit_code_is_the_runs(
    launch: Callable[..., Training], tmp_path: Path
) -> None:
    place = tmp_path / "archive"
    run = launch(
        *("--nproc", "1", "--upload", str(place), "--ckpt-dir", str(tmp_path / "ck")),
        program=["--steps", "1000", "--pace", "0.05"],
    )
    run.wait_for_step(3)
    # It is in the way by the time the run has ended.
    place.rmdir()
    place.write_text("")
    run.process.send_signal(signal.SIGINT)
    wait_for("an attempt", lambda: "the upload failed and is tried again" in run.output)
    run.process.send_signal(signal.SIGINT)
    assert run.finish(75)["result"] == "interrupted"
    assert f"not uploaded, as the run was ended; the run is kept in {run.run_dir}" in run.output


@pytest.mark.parametrize("verbose", range(4))
def test_each_verbosity_says_what_it_should(launch: Callable[..., Training], verbose: int) -> None:
    run = launch(
        *("--nproc", "2", "--spares", "1", "--min-ranks", "2", "--verbose", str(verbose)),
        program=["--steps", "30", "--suicide", "5:1", "--raise-at", "20"],
    )
    run.wait(3)
    # Not line by line: what comes from several processes may share one.
    said = run.output
    # What rank 0 prints, and that the run has failed, are said in any case.
    assert "step 5 rank 0 size 2" in said
    assert said.count("hpcft: the run has failed") == 1
    events = re.findall(r"hpcft: \d\d:\d\d:\d\d ([\w ]+),", said)
    assert ("failed (killed by SIGKILL), process 2" in said) == (verbose >= 1)
    assert (said.count("hpcft: ") == 1) == (verbose == 0)
    assert sorted(events) == sorted(e["kind"] for e in run.events() if verbose >= 2)
    assert bool(re.search(r"\[1\] step \d+ rank 1", said)) == (verbose >= 3)
