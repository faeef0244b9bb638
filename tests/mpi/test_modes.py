"""Training in which ranks do not wait for each other's gradients, and what failures do to it."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from training import HERE, PROGRAM, Training, kill_all, launched, wait_for

from hpcft.world.progress import peek

pytestmark = pytest.mark.mpi

DIGITS = HERE.parent / "examples" / "train_digits.py"


def start(tmp_path: Path, mode: str, nproc: int, spares: int, *rest: str) -> Training:
    options = ["--mode", mode, "--nproc", str(nproc), "--spares", str(spares)]
    at = rest.index("--") if "--" in rest else len(rest)
    run = Training(tmp_path / "run", [*options, *rest[:at]])
    run.program += rest[at + 1 :]
    return run.start()


def alike(run: Training, ranks: int) -> None:
    """So many ranks have come to the end, with the same parameters."""
    digests = re.findall(r"^digest (\w+)", run.logs(), re.M)
    assert len(digests) == ranks, digests
    assert len(set(digests)) == 1


def roles(run: Training) -> list[int]:
    """World ranks of those that train, by logical rank."""
    return [entry["world"] for entry in run.ranks() if entry["role"] == "active"]


@pytest.mark.parametrize("mode", ["local-sgd", "async"])
def test_a_spare_takes_the_place_of_a_killed_rank(tmp_path: Path, mode: str) -> None:
    run = start(tmp_path, mode, 3, 1, "--", "--suicide", "20:1")
    summary = run.finish()
    assert len(summary["failures"]) == 1
    assert summary["failures"][0]["cause"] == "killed by SIGKILL"
    alike(run, 3)
    assert roles(run) == [0, 3, 2]
    if mode == "async":
        # Nobody else has gone back, or met a step twice.
        for world in (0, 2):
            log = (run.run_dir / "logs" / f"rank-{world}.log").read_text()
            assert [int(n) for n in re.findall(r"^step (\d+)", log, re.M)] == list(range(1, 61))


def test_two_at_once_and_rank_0_among_them(tmp_path: Path) -> None:
    run = start(tmp_path, "async", 3, 1, "--", "--suicide", "20:0", "--suicide", "20:1")
    assert len(run.finish()["failures"]) == 2
    alike(run, 2)


def harmful(tmp_path: Path, world: int, method: str) -> Path:
    """A script that trains, but process ``world`` dies when its mesh comes to a method."""
    script = tmp_path / "harmful.py"
    harm = (
        "import os, signal\n"
        "from hpcft.train.mesh import Mesh\n"
        f"if os.environ.get('PMIX_RANK') == '{world}':\n"
        f"    Mesh.{method} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    text = PROGRAM.read_text().replace("import hpcft\n", f"import hpcft\n{harm}", 1)
    script.write_text(text)
    return script


@pytest.mark.parametrize(
    ("world", "method", "ranks"),
    [(0, "_send_snapshot", 3), (3, "settle", 3)],
    ids=["the giver", "who joins"],
)
def test_a_death_while_a_spare_joins(tmp_path: Path, world: int, method: str, ranks: int) -> None:
    options = ["--mode", "async", "--nproc", "3", "--spares", "2"]
    program = [str(harmful(tmp_path, world, method)), "--suicide", "20:1"]
    run = Training(tmp_path / "run", options, program).start()
    assert len(run.finish()["failures"]) == 2
    alike(run, ranks)


def test_nobody_is_further_ahead_than_allowed_and_the_end_waits(tmp_path: Path) -> None:
    run = start(tmp_path, "async", 3, 0, "--staleness", "4", "--", "--slow", "1", "--steps", "40")
    pids = {entry["logical"]: entry["pid"] for entry in run.ranks()}
    seen = []

    def ended() -> bool:
        # Those that are ahead first: what they add meanwhile would look like more.
        steps = [peek(pids[rank]) for rank in (0, 2, 1)]
        if all(steps):
            first, third, second = (reading.step for reading in steps if reading)
            seen.append(max(first, third) - second)
        return run.process.poll() is not None

    wait_for("the end", ended, 120)
    run.finish()
    alike(run, 3)
    assert max(seen) <= 4
    # The bound has been met, or it would not have been tested.
    assert max(seen) >= 3


@pytest.mark.parametrize("mode", ["local-sgd", "async"])
def test_checkpoints_are_gone_on_from(tmp_path: Path, mode: str) -> None:
    saved = ["--ckpt-dir", str(tmp_path / "saved"), "--ckpt-every", "7"]
    run = start(tmp_path, mode, 2, 1, *saved, "--", "--steps", "1000")
    run.wait_for_step(20)
    run.process.send_signal(signal.SIGUSR1)
    run.finish(75)
    left = run.events()[-1]
    assert left["kind"] == "interrupted"
    step = left["detail"]["newest"]
    # Where each rank is at a step of its own, another may have been the first to come so far.
    assert step == left["step"] >= (1 if mode == "async" else 20)
    (tmp_path / "again").mkdir()
    again = start(tmp_path / "again", mode, 2, 0, *saved, "--", "--steps", str(step + 20))
    again.finish()
    alike(again, 2)
    assert [e["step"] for e in again.events() if e["kind"] == "restore"] == [step]
    assert f"step {step + 1} rank 1" in again.logs()


def test_when_all_have_failed_they_are_launched_again(tmp_path: Path) -> None:
    saved = ["--ckpt-dir", str(tmp_path / "saved"), "--ckpt-every", "5"]
    go = tmp_path / "go"
    run = start(
        tmp_path, "async", 2, 0, *saved, "--", "--steps", "300", "--pace", "0.1", "--until", str(go)
    )
    wait_for("a checkpoint", lambda: any(e["kind"] == "checkpoint" for e in run.events()))
    kill_all(run)
    launched(run, 2)
    go.touch()
    run.finish()
    restored = [e["step"] for e in run.events() if e["kind"] == "restore"]
    assert restored
    assert restored[0] >= 5
    alike(run, 2)


def test_an_example_learns_as_well_in_every_mode(tmp_path: Path) -> None:
    read = {}
    for mode in ("sync", "local-sgd", "async"):
        program = [str(DIGITS), "--steps", "150"]
        run = Training(tmp_path / mode, ["--mode", mode, "--nproc", "2"], program).start()
        run.finish()
        (found,) = re.findall(r"([\d.]+)% of \d+ unseen digits", run.output)
        read[mode] = float(found)
    assert min(read.values()) > max(85, 0.95 * read["sync"]), read
