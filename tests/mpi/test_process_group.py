"""torch.distributed over the backend hpcft: collectives, DDP, DTensor, FSDP2."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from training import HERE, Training

pytestmark = pytest.mark.mpi

PROGRAM = HERE / "programs" / "collectives.py"
ELSEWHERE = HERE / "programs" / "elsewhere.py"
TRIALS = re.findall(r"@trial\ndef (\w+)", PROGRAM.read_text())


@pytest.fixture(scope="module", params=[[], [str(ELSEWHERE)]], ids=["in place", "staged"])
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """Each rank's account of all trials."""
    path = tmp_path_factory.mktemp("collectives")
    program = [*request.param, str(PROGRAM), str(path)]
    run = Training(path / "run", ["--nproc", "3"], program).start()
    try:
        run.wait()
    finally:
        run.stop()
    return [json.loads(Path(path, f"{rank}.json").read_text()) for rank in range(3)]


@pytest.mark.parametrize("trial", TRIALS)
def test_every_rank_gets_what_it_should(results: list[dict[str, str]], trial: str) -> None:
    for rank, result in enumerate(results):
        assert result[trial] == "", f"rank {rank}"
