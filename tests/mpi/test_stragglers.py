"""Ranks that are slow: found while they train, and replaced without a trace in the result."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from training import MOST_STEPS, PROGRAM, Training, undisturbed, wait_for

from hpcft.telemetry import laps

pytestmark = pytest.mark.mpi


class Slow:
    """A run in which one process is slow for as long as it is wanted.

    Parameters
    ----------
    program: what runs; takes the arguments of ``programs/train.py``.
    """

    def __init__(
        self,
        tmp_path: Path,
        process: int,
        options: list[str],
        program: list[str] | None = None,
        steps: int = MOST_STEPS,
        pace: float = 0.02,
    ) -> None:
        self._fast, self._hurry = tmp_path / "fast", tmp_path / "hurry"
        arguments = [*(program or [str(PROGRAM)]), "--steps", str(steps)]
        arguments += ["--slow-process", str(process), "--slow-until", str(self._fast)]
        arguments += ["--until", str(self._hurry), "--pace", str(pace)]
        options = ["--nproc", "3", "--replace-stragglers", *options]
        self.run = Training(tmp_path / "run", options, arguments).start()

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.events() if event["kind"] == kind]

    def wait_for(self, kind: str) -> dict[str, Any]:
        wait_for(kind, lambda: self.of_kind(kind) or self.run.process.poll() is not None, 180)
        assert self.of_kind(kind), self.run.output
        return self.of_kind(kind)[0]

    def recover(self) -> None:
        self._fast.touch()

    def finish(self) -> dict[str, Any]:
        self.recover()
        self._hurry.touch()
        return self.run.finish()


def test_a_slow_rank_changes_places_with_a_spare_and_nothing_else_changes(tmp_path: Path) -> None:
    # Rank 0, which has most to hand on.
    slow = Slow(tmp_path, 0, ["--spares", "1"])
    found = slow.wait_for("straggler")
    assert found["ranks"] == [0]
    assert found["detail"]["world"] == 0
    assert found["detail"]["factor"] > 1.2
    # Who waited for it was not blamed.
    assert found["detail"]["waiting_s"] < found["detail"]["others_waiting_s"]
    replaced = slow.wait_for("replaced")
    assert (replaced["detail"]["world"], replaced["detail"]["slow_world"]) == (3, 0)
    assert {e["world"]: e["logical"] for e in slow.run.ranks()} == {3: 0, 1: 1, 2: 2, 0: None}
    summary = slow.finish()
    assert summary["params_sha256"] == undisturbed(3)[MOST_STEPS]
    assert [one["slow_world"] for one in summary["replacements"]] == [0]
    assert summary["failures"] == []
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 1}
    [resume] = slow.of_kind("resume")
    assert (resume["detail"]["action"], resume["detail"]["lost_steps"]) == ("replace", 0)
    # No step was done twice.
    counted = sorted(
        step
        for lap in laps.read(slow.run.run_dir / "laps")
        if lap.rank == 1
        for step in range(lap.first, lap.last + 1)
    )
    assert counted == list(range(1, MOST_STEPS + 1))
    assert "is slow: it computes" in slow.run.output
    assert "is slow and became a spare, process 3" in slow.run.output


def test_who_was_slow_is_trusted_again_when_it_is_as_fast_as_the_others(tmp_path: Path) -> None:
    checkpoints = ["--ckpt-dir", str(tmp_path / "checkpoints"), "--ckpt-every", "20"]
    # Most of a step asleep, so that steps take as long on a busy machine.
    slow = Slow(tmp_path, 0, ["--spares", "1", *checkpoints], steps=1 << 30, pace=0.1)
    slow.wait_for("replaced")
    slow.recover()
    assert slow.wait_for("straggler over")["detail"]["world"] == 0
    # It takes over from who fails.
    slow.run.send(1)
    assert slow.wait_for("adoption")["detail"]["world"] == 0
    step = slow.run.step()
    slow.run.wait_for_step(step + 5)
    slow.run.process.send_signal(signal.SIGTERM)
    summary = slow.run.finish(code=75)
    assert [failure["ranks"] for failure in summary["failures"]] == [[1]]
    assert summary["world"] == {"initial": 3, "final": 3, "spares_left": 0}
    # The directory's lock went over to the new rank 0, and checkpoints with it.
    assert max(summary["checkpoints"]) == summary["steps"]


_SLOW, _OTHER, _SPARE = 1, 2, 3


@pytest.mark.parametrize(
    ("victim", "moment"),
    [(_SLOW, "_exchange"), (_SPARE, "_build"), (_OTHER, "gather")],
)
def test_a_death_in_the_middle_of_a_replacement_is_healed(
    tmp_path: Path, victim: int, moment: str
) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import os, runpy, signal, sys\n"
        "from hpcft.world.recovery import World\n"
        "def begun(world):\n"
        "    return world.membership.epoch == 0 and not world.link.failures\n"
        f"if os.environ['PMIX_RANK'] == '{victim}':\n"
        f"    method = World.{moment}\n"
        "    def dies(self, *args):\n"
        "        if begun(self):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return method(self, *args)\n"
        f"    World.{moment} = dies\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    slow = Slow(tmp_path, _SLOW, ["--spares", "2"], [str(script), str(PROGRAM)])
    slow.wait_for("failure")
    summary = slow.finish()
    assert summary["params_sha256"] == undisturbed(3)[MOST_STEPS]
    assert len(summary["failures"]) == 1
    assert summary["failures"][0]["cause"] == "killed by SIGKILL"
    assert summary["failures"][0]["lost_steps"] == 0
    assert summary["world"]["final"] == 3
    assert summary["world"]["spares_left"] == 1
