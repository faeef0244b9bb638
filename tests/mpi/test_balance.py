"""A batch shared out by speed comes to what an even one comes to."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import pytest
from training import HERE, Training, wait_for

PROGRAM = HERE / "programs" / "balanced.py"

pytestmark = pytest.mark.mpi


def parameters(run: Training) -> list[float]:
    [found] = re.findall(r"^parameters (.*)$", run.output, re.M)
    return [float(number) for number in found.split()]


@functools.cache
def even() -> list[float]:
    """What the training comes to where all ranks have the same."""
    with tempfile.TemporaryDirectory() as folder:
        run = Training(Path(folder) / "run", ["--nproc", "2"], [str(PROGRAM)]).start()
        run.finish()
        return parameters(run)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_slow_rank_has_less_and_the_result_is_the_same(tmp_path: Path, workers: int) -> None:
    program = [str(PROGRAM), "--slow-process", "1", "--workers", str(workers)]
    run = Training(tmp_path / "run", ["--nproc", "2", "--spares", "1", "--balance"], program)
    run.start()

    def in_force() -> bool:
        """Whether rank 1 has had fewer samples than at first in some steps."""
        log = run.run_dir / "logs" / "rank-1.log"
        said = re.findall(r"^samples of .*: (.*)\n", log.read_text() if log.exists() else "", re.M)
        return sum(len(numbers.split()) < 8 for numbers in said[:40]) >= 3

    wait_for("other shares", lambda: in_force() or run.process.poll() is not None)
    # They are part of the state, which a spare takes over.
    run.send(0)
    summary = run.finish()
    assert any(event["kind"] == "shares" for event in run.events())
    assert [failure["ranks"] for failure in summary["failures"]] == [[0]]
    assert parameters(run) == pytest.approx(even(), rel=1e-9)
    assert "the batch is shared out by speed" in run.output
    # Each sample once an epoch, of what was committed: who does a step again has it again.
    seen: dict[tuple[int, int], dict[int, list[int]]] = {}
    for number, log in enumerate(sorted(run.run_dir.glob("logs/rank-*.log"))):
        # A line that the kill has torn is of a step that is done again.
        said = re.findall(r"^samples of step (\d+) epoch (\d+): ([\d ]+)$", log.read_text(), re.M)
        for step, epoch, numbers in said:
            rank = 0 if number == 2 else number
            seen.setdefault((int(epoch), int(step)), {})[rank] = [int(n) for n in numbers.split()]
    for epoch in range(6):
        numbers = [
            n
            for (of, _), by_rank in seen.items()
            if of == epoch
            for own in by_rank.values()
            for n in own
        ]
        assert sorted(numbers) == list(range(16 * 40 + 5))
    last = max(seen)
    usual = [
        (len(by_rank[0]), len(by_rank[1]))
        for key, by_rank in seen.items()
        if key[0] == last[0] and sum(map(len, by_rank.values())) == 16
    ]
    fast, slow = usual[-1]
    assert fast > slow
