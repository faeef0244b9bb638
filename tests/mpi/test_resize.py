"""Workers that join a training under way, and leave it."""

from __future__ import annotations

import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training import Training, family, wait_for

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi

HPCFT = [sys.executable, "-m", "hpcft.cli.main"]


class Joined:
    """``hpcft join``, under way."""

    def __init__(self, run: Training, *options: str) -> None:
        self._out = run.run_dir.with_suffix(f".joined{len(Joined.all)}")
        command = [*HPCFT, "join", str(run.run_dir), *options]
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=run.environ
            )
        Joined.all.append(self)

    all: list[Joined] = []  # noqa: RUF012

    @property
    def output(self) -> str:
        return self._out.read_text(errors="replace")


@pytest.fixture
def join() -> Iterator[Callable[..., Joined]]:
    """Has workers join a run; what is left at the end is ended."""
    yield Joined
    for joined in Joined.all:
        joined.process.terminate()
        joined.process.wait(30)
    Joined.all.clear()


def checkpointed(path: Path, *options: str) -> list[str]:
    return ["--ckpt-dir", str(path / "checkpoints"), "--ckpt-every", "1000", *options]


def sizes(run: Training) -> dict[int, set[int]]:
    """With how many ranks each step was made, by rank 0's words."""
    found: dict[int, set[int]] = {}
    for step, size in re.findall(r"^step (\d+) rank 0 size (\d+)", run.logs(), re.M):
        found.setdefault(int(step), set()).add(int(size))
    return found


def trains_with(run: Training, size: int) -> None:
    wait_for(f"a step of {size} ranks", lambda: {size} in list(sizes(run).values())[-3:], 60)


def test_workers_join_and_leave_between_two_steps(
    launch: Launch, join: Callable[..., Joined], tmp_path: Path
) -> None:
    options = checkpointed(tmp_path, "--ckpt-near", "1000")
    go = tmp_path / "go"
    program = ["--pace", "0.1", "--steps", "100000", "--until", str(go)]
    run = launch("--nproc", "2:3", *options, program=program)
    run.wait_for_step(3)
    door = run.run_dir / "door.json"
    assert stat.S_IMODE(door.stat().st_mode) == 0o600

    two = join(run, "--ranks", "2")
    trains_with(run, 3)
    # One after the other, if they have not come together.
    roles = ["active"] * 3 + ["spare"]
    wait_for("both", lambda: sorted(entry["role"] for entry in run.ranks()) == roles)
    # A spare like all others.
    run.send(1)
    wait_for("a recovery", lambda: any(e["kind"] == "recovered" for e in run.events()))
    assert run.events()[-2]["detail"]["action"] == "substitute"

    # The shepherd of the rank that was killed starts another, once all are launched again.
    left = subprocess.run(
        [*HPCFT, "leave", str(run.run_dir), "--ranks", "1,2"], capture_output=True, text=True
    )
    assert (left.returncode, left.stdout) == (0, "2 left; 2 processes go on\n"), left.stderr
    trains_with(run, 2)
    refused = subprocess.run(
        [*HPCFT, "leave", str(run.run_dir), "--ranks", "1"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "1 processes would be left, of at least 2" in refused.stderr

    last = max(sizes(run)) + 5
    run.wait_for_step(last)
    run.process.send_signal(signal.SIGUSR1)
    summary = run.finish(75)
    assert two.process.wait(30) in (0, 75)
    *joins, leaves = (resize["reason"].split()[-1] for resize in summary["resizes"])
    assert ({join.rstrip("s") for join in joins}, leaves) == ({"join"}, "leave")
    assert [failure["lost_steps"] for failure in summary["failures"]] == [0]
    # Each step once, but for those that the program had no time to tell of, and with one size.
    made = sizes(run)
    ends = [*summary["resizes"], *summary["failures"]]
    untold = {end["step"] for end in ends} | {summary["steps"]}
    assert sorted({*made} | untold) == [*range(1, summary["steps"] + 1)]
    assert all(len(size) == 1 for size in made.values())
    assert not door.exists()
    assert not family(run.run_dir)


def test_who_joins_and_dies_does_not_matter(
    launch: Launch, join: Callable[..., Joined], tmp_path: Path
) -> None:
    run = launch("--nproc", "2", program=["--steps", "100000", "--pace", "0.05"])
    run.wait_for_step(3)
    refused = join(run)
    assert refused.process.wait(60) != 0
    assert "cannot be resized: start it with --ckpt-dir DIR" in refused.output
    run.stop()

    run = launch(*checkpointed(tmp_path), "--nproc", "1", program=["--pace", "0.05"])
    run.wait_for_step(3)
    one = join(run)
    wait_for("the guest", lambda: len(family(run.run_dir)) > 6)
    for pid in family(run.run_dir):
        if b"hpcft.join" in Path(f"/proc/{pid}/cmdline").read_bytes():
            subprocess.run(["kill", "-9", str(pid)], check=False)
    one.process.wait(60)
    summary = run.finish()
    assert summary["steps"] == 60


def test_who_cannot_save_stays(launch: Launch, tmp_path: Path) -> None:
    run = launch(
        *("--nproc", "3", *checkpointed(tmp_path)),
        program=["--steps", "100000", "--pace", "0.05"],
    )
    run.wait_for_step(3)
    checkpoints = tmp_path / "checkpoints"
    aside = checkpoints.rename(tmp_path / "aside")
    checkpoints.write_text("no directory")
    left = subprocess.run(
        [*HPCFT, "leave", str(run.run_dir), "--ranks", "1"], capture_output=True, text=True
    )
    assert left.returncode == 1
    assert "could not save" in left.stderr
    trains_with(run, 3)
    run.wait_for_step(run.step() + 3)
    checkpoints.unlink()
    aside.rename(checkpoints)
    run.process.send_signal(signal.SIGUSR1)
    assert run.finish(75)["resizes"] == []


def test_asked_to_end_between_two_launches_it_has_saved(
    launch: Launch, join: Callable[..., Joined], tmp_path: Path
) -> None:
    options = [*checkpointed(tmp_path), "--nproc", "1:2"]
    run = launch(*options, program=["--steps", "100000", "--pace", "0.05"])
    run.wait_for_step(3)
    joined = join(run)
    wait_for("the resize", lambda: "going on with 2 processes" in run.output)
    run.process.send_signal(signal.SIGINT)
    summary = run.finish(75)
    assert summary["result"] == "interrupted"
    joined.process.wait(60)
    again = launch(*options, program=["--steps", str(summary["steps"] + 3)])
    assert again.finish()["restored_step"] == summary["steps"]
