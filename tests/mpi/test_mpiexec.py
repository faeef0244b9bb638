"""Trainings on this machine that lose ranks, and end as if they had not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from training import PROGRAM, Training, family, kill_at_start, wait_for

from hpcft.telemetry import laps
from hpcft.world.progress import shepherd_of

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi


def kinds(run: Training) -> list[str]:
    """What has happened; who is slow on a machine that is busy is not the matter here."""
    found = [event["kind"] for event in run.events()]
    return [kind for kind in found if kind not in ("straggler", "straggler over")]


def test_killed_ranks_are_replaced_and_nothing_changes(launch: Launch, undisturbed: str) -> None:
    run = launch("--nproc", "3", "--spares", "3")
    run.wait_for_step(1)
    words = [word for pid in family(run.run_dir) for word in psutil.Process(pid).cmdline()]
    memory = next(Path(word) for word in words if word.startswith("/dev/shm/hpcft-scratch-"))
    assert memory.exists()
    for victim in range(3):
        run.wait_for_step(10 + 15 * victim)
        run.send(victim)
        wait_for("the recovery", lambda victim=victim: kinds(run).count("recovered") > victim)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 0}
    for victim, failure in enumerate(summary["failures"]):
        assert failure["ranks"] == [victim]
        assert failure["cause"] == "killed by SIGKILL"
        assert failure["action"] == "substitute"
        assert failure["lost_steps"] == 0
        assert failure["stall_s"] >= failure["recover_s"] > 0
    each = ["failure", "detection", "adoption", "resume", "recovered"]
    assert kinds(run) == ["start", *each, *each, *each, "finish"]
    assert all({"time", "step", "ranks", "epoch"} <= event.keys() for event in run.events())
    assert [e["role"] for e in run.ranks()] == ["active"] * 3
    assert not memory.exists()
    # Where the time went is known of the ranks there are at the end, from the last recovery on.
    last = [event for event in run.events() if event["kind"] == "resume"][-1]
    for rank in range(3):
        known = [lap for lap in laps.read(run.run_dir / "laps") if lap.rank == rank]
        steps = [n for lap in known if lap.epoch == 3 for n in range(lap.first, lap.last + 1)]
        assert steps == list(range(last["step"] + 1, summary["steps"] + 1))


def test_killed_in_the_middle_of_a_step(launch: Launch, undisturbed: str) -> None:
    program = ["--suicide", "7:0", "--lag-at", "20", "--suicide", "30:1"]
    summary = launch("--nproc", "3", "--spares", "3", program=program).finish()
    assert summary["params_sha256"] == undisturbed
    # Step 20, in which rank 2 died, is complete on rank 0 alone; its state is taken.
    found = [(f["step"], f["ranks"]) for f in summary["failures"]]
    assert found == [(7, [0]), (21, [2]), (30, [1])]
    assert {f["lost_steps"] for f in summary["failures"]} == {0}


def test_two_at_once_and_a_spare(launch: Launch, undisturbed: str) -> None:
    run = launch("--nproc", "3", "--spares", "3")
    run.wait_for_step(10)
    spare = next(entry for entry in run.ranks() if entry["role"] == "spare")
    os.kill(spare["pid"], signal.SIGKILL)
    run.wait_for_step(20)
    for victim in [run.entry(0)["pid"], run.entry(2)["pid"]]:
        os.kill(victim, signal.SIGKILL)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 0}
    assert sorted(f["role"] for f in summary["failures"]) == ["active", "active", "spare"]


def test_a_stopped_rank_is_fenced_before_the_others_go_on(launch: Launch, undisturbed: str) -> None:
    run = launch("--nproc", "3", "--spares", "1")
    run.wait_for_step(15)
    pid = run.entry(1)["pid"]
    run.send(1, signal.SIGSTOP)
    wait_for("the adoption", lambda: "adoption" in kinds(run))
    # It may be on its way out, at the kernel's leisure; left to itself it would stay as it is.
    with suppress(psutil.NoSuchProcess):
        status = psutil.Process(pid).status()
        assert status != psutil.STATUS_STOPPED, "the stopped process is there to be continued"
    wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert "SIGSTOP" in summary["failures"][0]["cause"]


def test_a_rank_stopped_for_a_moment_is_left_alone(launch: Launch, undisturbed: str) -> None:
    run = launch("--nproc", "3", "--spares", "1", "--timeout-detect", "5")
    run.wait_for_step(15)
    run.send(1, signal.SIGSTOP)
    time.sleep(0.3)
    run.send(1, signal.SIGCONT)
    summary = run.finish()
    assert summary["failures"] == []
    assert summary["params_sha256"] == undisturbed
    # A spare that is not needed leaves.
    assert summary["world"]["spares_left"] == 1


def test_long_computing_is_no_hang(launch: Launch) -> None:
    run = launch(
        "--nproc", "2", "--timeout-detect", "0.4", program=["--steps", "10", "--busy", "3"]
    )
    assert run.finish()["failures"] == []


def test_a_deadlocked_rank_is_found_and_its_stacks_are_logged(
    launch: Launch, undisturbed: str
) -> None:
    run = launch(
        "--nproc", "3", "--spares", "1", "--timeout-progress", "2", program=["--deadlock-at", "20"]
    )
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    [failure] = summary["failures"]
    assert failure["ranks"] == [1]
    assert "stuck" in failure["cause"]
    log = (run.run_dir / "logs" / "rank-1.log").read_text()
    assert "in harm" in log


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_whose_shepherd_is_killed_is_replaced(
    launch: Launch, undisturbed: str, victim: int
) -> None:
    run = launch("--nproc", "3", "--spares", "1")
    run.wait_for_step(10)
    shepherd = shepherd_of(run.entry(victim)["pid"])
    os.kill(shepherd, signal.SIGKILL)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    [failure] = summary["failures"]
    assert (failure["ranks"], failure["cause"]) == ([victim], "its shepherd died")


def test_a_run_that_loses_its_first_shepherd_and_fails_says_so(launch: Launch) -> None:
    run = launch("--nproc", "2", "--on-failure", "substitute")
    run.wait_for_step(10)
    os.kill(shepherd_of(run.entry(0)["pid"]), signal.SIGKILL)
    summary = run.finish(code=3)
    assert summary["result"] == "failed"
    assert "no spare is left" in summary["reason"]


def test_a_recovery_that_jams_gives_up_a_spare(tmp_path: Path) -> None:
    script = tmp_path / "jam.py"
    script.write_text(
        "import os, runpy, sys, time\n"
        "from hpcft.world.recovery import World\n"
        "if os.environ['PMIX_RANK'] == '3':\n"
        "    World._exchange = lambda *_: time.sleep(3600)\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    options = ["--nproc", "3", "--spares", "1"]
    run = Training(tmp_path / "run", options, [str(script), str(PROGRAM)]).start()
    run.wait_for_step(10)
    run.send(1)
    summary = run.finish()
    assert summary["world"] == {"initial": 3, "final": 2, "spares_left": 0}
    causes = [failure["cause"] for failure in summary["failures"]]
    assert causes == ["killed by SIGKILL", "stuck in a recovery for 10 s"]
    assert "in <lambda>" in (run.run_dir / "logs" / "rank-3.log").read_text()


@pytest.mark.parametrize("way", ["scale-lr", "keep-global-batch"])
def test_without_spares_the_job_goes_on_smaller_and_adjusts_what_the_user_chose(
    launch: Launch, way: str
) -> None:
    program = ["--suicide", "20:3", "--on-shrink", way, "--steps", "40"]
    run = launch("--nproc", "4", program=program)
    summary = run.finish()
    assert summary["world"] == {"initial": 4, "final": 3, "spares_left": 0}
    assert summary["failures"][0]["action"] == "shrink"
    assert summary["steps"] == 40
    _, seen, _, rate = run.output.splitlines()[-1].split()
    # StepLR: 0.9 every 10 steps.
    expected = 1e-2 * 0.9**4
    if way == "scale-lr":
        assert float(rate) == pytest.approx(expected * 3 / 4)
        assert int(seen) == 40 * 16
    else:
        assert float(rate) == pytest.approx(expected)
        assert int(seen) in (20 * 16 + 20 * 21, 20 * 16 + 20 * 22)


def test_below_min_ranks_the_end_is_clear(launch: Launch) -> None:
    run = launch("--nproc", "2", "--min-ranks", "2")
    run.wait_for_step(10)
    run.send(1)
    summary = run.finish(code=3)
    assert summary["result"] == "failed"
    assert "--min-ranks" in summary["reason"]
    assert "--min-ranks" in run.output
    [failure] = summary["failures"]
    assert failure["cause"] == "killed by SIGKILL"
    assert failure["ranks"] == [1]
    assert failure["recover_s"] is None


def test_a_script_that_always_raises_is_not_healed_for_ever(launch: Launch) -> None:
    run = launch("--nproc", "2", "--spares", "2", program=["--raise-at", "5"])
    summary = run.finish(code=1)
    assert "in the same way" in summary["reason"]
    assert "this script is wrong" in summary["reason"]
    assert len(summary["failures"]) == 2


def test_a_script_that_fails_in_all_ranks_ends_with_its_code(
    launch: Launch, tmp_path: Path
) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("import sys; sys.exit(7)\n")
    run = Training(tmp_path / "run", ["--nproc", "2"], [str(script)]).start()
    assert run.finish(code=7)["result"] == "failed"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_starting_ends_the_launch(tmp_path: Path, victim: int) -> None:
    kill_at_start(tmp_path, victim)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = Training(tmp_path / "run", ["--nproc", "3"], environ=environ).start()
    assert run.process.wait(60) != 0
    assert run.output.count("hpcft:") == 1
    assert f"rank {victim} ended while starting: killed by SIGKILL" in run.output
    assert not family(run.run_dir)


def test_a_shepherd_that_dies_while_the_ranks_start_ends_the_launch(tmp_path: Path) -> None:
    kill_at_start(tmp_path, 1, shepherd_after=1.5)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = Training(tmp_path / "run", ["--nproc", "3"], environ=environ).start()
    assert run.process.wait(60) != 0
    assert run.output.count("hpcft:") == 1
    assert "shepherd ended while the ranks were starting" in run.output
    assert not family(run.run_dir)


def test_after_a_failure_among_the_scripts_own_collectives_it_is_run_anew(
    launch: Launch, undisturbed: str
) -> None:
    run = launch("--nproc", "3", "--spares", "1", program=["--suicide", "wrapping:1"])
    summary = run.finish()
    assert [f["ranks"] for f in summary["failures"]] == [[1]]
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 0}
    assert summary["params_sha256"] == undisturbed


@pytest.mark.parametrize("when", ["run:1", "run:0", "0:0", "0:2", "1:0", "1:1"])
def test_a_failure_as_training_begins(launch: Launch, undisturbed: str, when: str) -> None:
    run = launch("--nproc", "3", "--spares", "1", program=["--suicide", when])
    assert run.finish()["params_sha256"] == undisturbed


def test_a_rank_killed_after_training_leaves_its_mark_on_the_exit_code(launch: Launch) -> None:
    run = launch("--nproc", "2", program=["--suicide", "end:1"])
    summary = run.finish(code=137)
    # Training was over, and all of it is right; what the script does after it is not.
    assert summary["result"] == "ok"
    assert not summary["failures"]
    assert "rank 1 failed after the training was over: killed by SIGKILL" in run.output


def test_a_module_is_run_as_python_would(tmp_path: Path) -> None:
    module = tmp_path / "pack" / "train.py"
    module.parent.mkdir()
    module.write_text("import sys; print(__name__, __package__, sys.argv[1:])\n")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = Training(
        tmp_path / "run", ["--nproc", "1"], ["-m", "pack.train", "--", "-m", "x"], environ=environ
    )
    run.start().wait()
    assert "__main__ pack ['--', '-m', 'x']" in run.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_launcher_nothing_is_left(launch: Launch, number: int) -> None:
    run = launch("--nproc", "2", program=["--steps", "100000"])
    run.wait_for_step(5)
    assert len(family(run.run_dir)) >= 6
    run.process.send_signal(number)
    code = run.process.wait(20)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)


def test_if_mpiexec_is_killed_that_is_said_and_nothing_is_left(launch: Launch) -> None:
    run = launch("--nproc", "2", program=["--steps", "100000"])
    run.wait_for_step(5)
    os.kill(run.mpiexec(), signal.SIGKILL)
    summary = run.finish(code=137)
    assert summary["result"] == "failed"
    assert "mpiexec ended with exit code 137" in summary["reason"]
    assert summary["reason"] in run.output
    assert not family(run.run_dir)


@pytest.mark.parametrize("fails", [False, True])
def test_an_mpiexec_that_does_not_end_is_ended(launch: Launch, fails: bool) -> None:
    run = launch("--nproc", "2", "--on-failure", "substitute")
    run.wait_for_step(20)
    # It has been seen to lock itself out while it took in the last tasks.
    os.kill(run.mpiexec(), signal.SIGSTOP)
    if fails:
        run.send(1)
    summary = run.finish(code=3 if fails else 0)
    assert summary["result"] == ("failed" if fails else "ok")
    assert ("shrinking is not allowed" in summary["reason"]) == fails
    assert not family(run.run_dir)


def test_a_cold_spare_does_as_well(launch: Launch, undisturbed: str) -> None:
    run = launch("--nproc", "3", "--spares", "1", "--no-warm")
    run.wait_for_step(20)
    run.send(1)
    assert run.finish()["params_sha256"] == undisturbed


def test_under_an_existing_mpiexec_the_ranks_are_taken_as_they_are(
    launch: Launch, undisturbed: str, tmp_path: Path
) -> None:
    mpiexec = Path(sys.prefix) / "bin" / "mpiexec"
    prefix = [str(mpiexec), "--with-ft", "ulfm", "--allow-run-as-root", "-n", "4"]
    prefix += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    run = Training(tmp_path / "run", ["--spares", "1"], prefix=prefix).start()
    run.wait_for_step(20)
    run.send(2)
    assert run.finish()["params_sha256"] == undisturbed


def test_as_a_single_process_a_script_runs_without_a_launcher() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--steps", "3", "--pace", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "step 3 rank 0 size 1" in done.stdout, done.stderr
