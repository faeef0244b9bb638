"""Spares where memory is short: under real limits of a control group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import HERE, Training, wait_for

from hpcft.world.progress import shepherd_of

# What makes such a group is there for the benchmarks.
sys.path.append(str(HERE.parent / "benchmarks"))

from limits import MemoryGroup

pytestmark = pytest.mark.mpi

#: Seconds for a spare to notice, on a machine that may do other things as well.
PATIENCE = 90


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    try:
        made = MemoryGroup("hpcft-test")
    except SystemExit as why:
        pytest.skip(str(why))
    with made:
        yield made


@pytest.fixture
def launch(tmp_path: Path, group: MemoryGroup) -> Iterator[Callable[..., Training]]:
    started: list[Training] = []

    def start(*options: str, steps: int = 3000) -> Training:
        run = Training(tmp_path / "run", ["--nproc", "3", *options])
        run.program += ["--until", str(tmp_path / "hurry"), "--steps", str(steps)]
        run.program += ["--pace", "0.2", "--digest-every", "12"]
        # A shell enters the group, and what it becomes starts the rest there.
        procs = group.path / "cgroup.procs"
        run.prefix = ["sh", "-c", f'echo $$ > {procs}; exec "$@"', "sh"]
        started.append(run.start())
        return run

    yield start
    for run in started:
        run.stop()


def events(run: Training, kind: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["kind"] == kind]


def short(group: MemoryGroup, run: Training) -> None:
    """Have less be left than is to stay free, and more than nothing."""
    before = len(events(run, "spare cooled"))
    group.limit(int(1.06 * group.used))
    wait_for("a cold spare", lambda: len(events(run, "spare cooled")) > before, PATIENCE)


def test_a_cold_spare_takes_over_without_a_trace_in_the_parameters(
    launch: Callable[..., Training], group: MemoryGroup, tmp_path: Path, undisturbed: str
) -> None:
    run = launch("--spares", "1", steps=60)
    run.wait_for_step(3)
    short(group, run)
    # What it is to make again needs memory; it is not given any by itself for a while.
    group.limit(1 << 40)
    run.send(1)
    wait_for("the recovery", lambda: events(run, "recovered"), PATIENCE)
    (tmp_path / "hurry").touch()
    assert run.finish()["params_sha256"] == undisturbed
    (resumed,) = events(run, "resume")
    assert resumed["detail"]["phases"]["warm_s"] > 0
    assert [event["detail"]["world"] for event in events(run, "adoption")] == [3]
    assert group.kills == 0


def test_a_spare_is_warm_again_when_memory_is_there_and_lets_go_of_all_each_time(
    launch: Callable[..., Training], group: MemoryGroup, tmp_path: Path
) -> None:
    run = launch("--spares", "1")
    run.wait_for_step(3)
    held = []
    for times in (1, 2):
        short(group, run)
        held.append(events(run, "spare cooled")[-1]["detail"]["held"])
        group.limit(1 << 40)
        wait_for("a warm spare", lambda n=times: len(events(run, "spare warmed")) == n, PATIENCE)
    # Nothing of what the first run of the script had made is left after the second.
    assert held[1] < 1.1 * held[0]
    short(group, run)
    # The end takes some.
    group.limit(1 << 40)
    (tmp_path / "hurry").touch()
    assert run.finish(seconds=240)["failures"] == []
    assert group.kills == 0


def test_of_two_spares_the_warm_one_is_adopted_and_nobody_waits_for_the_other(
    launch: Callable[..., Training], group: MemoryGroup, tmp_path: Path
) -> None:
    run = launch("--spares", "2")
    run.wait_for_step(3)
    short(group, run)
    group.limit(1 << 40)
    (cold,) = {event["detail"]["world"] for event in events(run, "spare cooled")}
    run.send(1)
    wait_for("the recovery", lambda: events(run, "recovered"), PATIENCE)
    (tmp_path / "hurry").touch()
    assert run.finish(seconds=240)["failures"]
    (adopted,) = [event["detail"]["world"] for event in events(run, "adoption")]
    assert adopted in {3, 4} - {cold}
    assert "warm_s" not in events(run, "resume")[0]["detail"]["phases"]


def test_of_two_warm_spares_the_one_with_memory_is_adopted(
    launch: Callable[..., Training], group: MemoryGroup, tmp_path: Path
) -> None:
    run = launch("--spares", "2")
    run.wait_for_step(3)
    (first,) = [rank["pid"] for rank in run.ranks() if rank["world"] == 3]
    shepherd = shepherd_of(first)
    with MemoryGroup("hpcft-test-other") as other:
        # As if that spare was on another machine. There is more left than is to stay free, but not
        # so much more that a spare would be warmed.
        procs = other.path / "cgroup.procs"
        hold = "held = b'x' * (400 << 20); print(flush=True); input()"
        with subprocess.Popen(
            ["sh", "-c", f'echo $$ > {procs}; exec "$@"', "sh", sys.executable, "-c", hold],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            other.limit(int(other.used / 0.88))
            procs.write_text(str(shepherd))
            # Far longer than it takes to notice.
            run.wait_for_step(run.step() + 20)
            run.send(1)
            wait_for("the recovery", lambda: events(run, "recovered"), PATIENCE)
            (group.path / "cgroup.procs").write_text(str(shepherd))
            holder.kill()
    (tmp_path / "hurry").touch()
    run.finish(seconds=240)
    assert not events(run, "spare cooled")
    assert [event["detail"]["world"] for event in events(run, "adoption")] == [4]


def test_spares_that_are_to_stay_warm_do(
    launch: Callable[..., Training], group: MemoryGroup, tmp_path: Path
) -> None:
    run = launch("--spares", "1", "--spares-memory", "always")
    run.wait_for_step(3)
    group.limit(int(1.04 * group.used))
    step = run.step()
    # Far longer than it takes to notice.
    run.wait_for_step(step + 20)
    group.limit(1 << 40)
    (tmp_path / "hurry").touch()
    run.finish(seconds=240)
    assert not events(run, "spare cooled")
