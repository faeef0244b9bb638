"""A run that is asked to end saves the step it is in, and the next goes on from there."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from training import Training, family, undisturbed, wait_for

pytestmark = pytest.mark.mpi

Launch = Callable[..., Training]


def options(tmp_path: Path, spares: int = 1) -> list[str]:
    near = ["--ckpt-near", f"7:{tmp_path}/near"]
    far = ["--ckpt-dir", str(tmp_path / "checkpoints"), "--ckpt-every", "1000"]
    return ["--nproc", "3", "--spares", str(spares), *far, *near]


def last_steps(run: Training) -> set[int]:
    """The last step that each rank has said it has completed; a warm spare says 0."""
    logs = [log.read_text() for log in run.run_dir.glob("logs/*.log")]
    return {int(found[-1]) for text in logs if (found := re.findall(r"^step (\d+)", text, re.M))}


def test_what_was_asked_to_end_goes_on_as_if_nothing_had_happened(
    launch: Launch, tmp_path: Path
) -> None:
    run = launch(*options(tmp_path))
    run.wait_for_step(10)
    run.process.terminate()
    first = run.finish(75)
    assert (first["result"], first["failures"]) == ("interrupted", [])
    assert first["checkpoints"] == [first["steps"]]
    # Who says it after the commit at which all leave does not come to say it.
    assert last_steps(run) - {0} <= {first["steps"], first["steps"] - 1}
    assert f"the next start goes on from step {first['steps']}" in run.output
    assert not family(run.run_dir)
    assert not list(tmp_path.glob("near/hpcft-near-*/*"))

    # A rank dies while the others settle when to leave, and another is asked besides.
    run = launch(*options(tmp_path))
    run.wait_for_step(25)
    run.send(1)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        run.process.send_signal(number)
    second = run.finish(75)
    assert second["restored_step"] == first["steps"]
    assert second["checkpoints"][-1] == second["steps"] < 60

    run = launch(*options(tmp_path))
    third = run.finish()
    assert third["restored_step"] == second["steps"]
    assert third["params_sha256"] == undisturbed(3)[60]


def test_asked_twice_a_run_ends_at_once(launch: Launch, tmp_path: Path) -> None:
    run = launch(*options(tmp_path, spares=0), program=["--deadlock-at", "3"])
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGINT)
    # Two signals that are pending together are one.
    time.sleep(1)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    run.wait(130)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_run_that_does_not_train_yet_ends_at_once(launch: Launch, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import time, hpcft\nhpcft.init()\nprint('setting up', flush=True)\ntime.sleep(1000)\n"
    )
    run = Training(tmp_path / "run", options(tmp_path, spares=0), [str(script)]).start()
    wait_for("the script", lambda: "setting up" in run.output)
    run.process.terminate()
    run.wait(143)


def test_a_warning_with_nowhere_to_save_to_ends_nothing(launch: Launch) -> None:
    run = launch("--nproc", "2")
    run.wait_for_step(10)
    run.process.send_signal(signal.SIGUSR1)
    wait_for("an answer", lambda: "start with --ckpt-dir" in run.output)
    assert run.finish()["result"] == "ok"
