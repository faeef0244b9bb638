"""The end of a run: ranks leave it when they have finished, and not when others have."""

from __future__ import annotations

from pathlib import Path

import pytest
from training import PROGRAM, Training, wait_for

pytestmark = pytest.mark.mpi


def test_ranks_end_when_they_have_finished(tmp_path: Path) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    script = tmp_path / "long.py"
    text = PROGRAM.read_text()
    # Rank 1 evaluates, for as long as the test wants it to.
    after = (
        f"    import pathlib\n    if job.rank == 1:\n"
        f"        while not pathlib.Path({str(go)!r}).exists():\n            time.sleep(0.05)\n"
        f"        pathlib.Path({str(done)!r}).touch()\n"
    )
    script.write_text(text.replace('    die("end")\n', after, 1))
    run = Training(tmp_path / "run", ["--nproc", "3", "--spares", "1"], [str(script)]).start()
    wait_for("the training's end", lambda: run.events() and run.events()[-1]["kind"] == "finish")
    pids = {entry["logical"]: entry["pid"] for entry in run.ranks()}

    def left() -> set[int]:
        return {rank for rank, pid in pids.items() if not Path(f"/proc/{pid}").exists()}

    wait_for("the others to leave", lambda: left() >= {0, 2})
    assert 1 not in left()
    assert run.process.poll() is None
    go.touch()
    assert run.finish()["result"] == "ok"
    assert done.exists()
