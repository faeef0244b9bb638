"""Trainings that are killed altogether, started again, and end as if they had not been."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch.utils._pytree import tree_leaves
from training import HERE, PROGRAM, Training, family, wait_for

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.restore import load
from hpcft.ckpt.store import Store
from hpcft.cli.main import main

Launch = Callable[..., Training]

pytestmark = pytest.mark.mpi

ELSEWHERE = HERE / "programs" / "elsewhere.py"
#: Leaves large enough to be cut into parts, one a rank.
WIDE = ["--width", "5000"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def options(folder: Path, every: object = 1, nproc: int = 3, spares: int = 0) -> list[str]:
    checkpoints = ["--ckpt-dir", str(folder), "--ckpt-every", str(every)]
    return ["--nproc", str(nproc), "--spares", str(spares), *checkpoints]


def kill_all(run: Training) -> None:
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    wait_for("all processes to end", lambda: not family(run.run_dir), 20)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Store(folder).committed()]


def contents(folder: Path) -> dict[int, dict[str, Any]]:
    engine = Engine(16 << 20)
    return dict(load(checkpoint.state, engine) for checkpoint in Store(folder).committed())


@dataclass(frozen=True)
class Saved:
    """What a training of 3 ranks, wide enough for all to write, has left after steps 7, 8 and 60.

    digest: that of its parameters at the end.
    """

    folder: Path
    digest: str

    def copy(self, folder: Path, *without: int) -> None:
        """Copy its checkpoints, but for those of some steps."""
        names = [f"step-{step:012d}" for step in without]
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns(*names))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run = Training(folder.with_name("run"), options(folder, every=1000))
    run.program += [*WIDE, "--save-at=7", "--save-at=8"]
    summary = run.start().finish()
    assert summary["failures"] == []
    return Saved(folder, summary["params_sha256"])


def test_killed_again_and_again(launch: Launch, undisturbed: str, folder: Path) -> None:
    saved: list[int] = []
    for every, more in ((1, ["--no-ckpt-overlap"]), (5, [])):
        run = launch(*options(folder, every), *more)
        before = saved[-1] if saved else 0
        wait_for(
            "two checkpoints",
            lambda before=before: folder.exists() and sum(n > before for n in steps(folder)) >= 2,
        )
        kill_all(run)
        assert ("restored from" in run.output) == bool(saved)
        saved = steps(folder)
        # Each of them is whole, and holds what it says.
        for step, content in contents(folder).items():
            assert content["values"]["seen"] == step * 16
            assert content["optimizer"]["state"][0]["step"].item() == step
    summary = launch(*options(folder, every=5)).finish()
    assert summary["restored_step"] == saved[-1]
    assert summary["params_sha256"] == undisturbed
    assert summary["steps"] == 60
    # The newest three, and nothing lies about. (A busy machine may have skipped some.)
    newest_three = [*saved, *summary["checkpoints"]][-3:]
    assert newest_three[-1] == 60
    assert sorted(entry.name for entry in folder.iterdir()) == [
        f"step-{step:012d}" for step in newest_three
    ]


def test_a_last_step_that_cannot_be_saved_is_told_at_the_end(launch: Launch, folder: Path) -> None:
    run = launch(*options(folder, every=20, nproc=2), program=["--pace", "0.05"])
    wait_for("a checkpoint", lambda: folder.exists() and steps(folder))
    kept = folder.rename(folder.with_name("kept"))
    folder.write_text("no directory any more")
    # The script has done its work.
    run.finish(0)
    newest = steps(kept)[-1]
    said = f"its last step, 60, is not saved; the newest checkpoint is of step {newest}"
    assert said in run.output
    unsaved = [event for event in run.events() if event["kind"] == "unsaved"]
    assert [(event["step"], event["detail"]) for event in unsaved] == [(60, {"newest": newest})]


@pytest.mark.parametrize("nproc", [1, 4])
def test_a_finished_run_is_restored_on_another_number_of_ranks(
    launch: Launch, saved: Saved, folder: Path, nproc: int
) -> None:
    saved.copy(folder)
    summary = launch(*options(folder, nproc=nproc), program=WIDE).finish()
    assert (summary["restored_step"], summary["params_sha256"]) == (60, saved.digest)


def test_a_file_per_rank_killed_and_restored_on_another_number_of_ranks(
    launch: Launch, saved: Saved, folder: Path
) -> None:
    apart = ["--ckpt-layout", "per-rank"]
    run = launch(*options(folder, every=5), *apart, program=WIDE)
    wait_for("two checkpoints", lambda: folder.exists() and len(steps(folder)) >= 2)
    kill_all(run)
    assert [e["detail"]["layout"] for e in run.events() if e["kind"] == "layout"] == ["per-rank"]
    assert "each rank writes checkpoints to a file of its own, as it was asked for" in run.output
    before = contents(folder)
    assert all(content["values"]["seen"] == step * 16 for step, content in before.items())
    assert len(list(folder.glob("step-*/shard-*.h5"))) == 3 * len(before)
    summary = launch(*options(folder, every=5), *apart, program=WIDE).finish()
    assert (summary["restored_step"], summary["params_sha256"]) == (max(before), saved.digest)
    summary = launch(*options(folder, nproc=2), program=WIDE).finish()
    assert (summary["restored_step"], summary["params_sha256"]) == (60, saved.digest)


def test_tensors_that_only_torch_can_reach_travel_as_well(saved: Saved, folder: Path) -> None:
    def run(name: str, *more: str, nproc: int = 3, spares: int = 0) -> Training:
        listed = options(folder, 1000, nproc, spares)
        program = [str(ELSEWHERE), str(PROGRAM), *WIDE, *more]
        return Training(folder.with_name(name), [*listed, "--ckpt-memory", "16M"], program).start()

    # The spare gets the parameters, and what is restored goes into those that are there.
    disturbed = run("disturbed", "--save-at=7", "--save-overlap", "--suicide=20:1", spares=1)
    try:
        summary = disturbed.finish()
    finally:
        disturbed.stop()
    assert [failure["action"] for failure in summary["failures"]] == ["substitute"]
    assert summary["params_sha256"] == saved.digest
    assert steps(folder) == [7, 60]
    ours, theirs = (sorted(_tensors(contents(where)[7])) for where in (folder, saved.folder))
    assert ours == theirs
    shutil.rmtree(folder / "step-000000000060")
    restored = run("restored")
    try:
        summary = restored.finish()
    finally:
        restored.stop()
    assert (summary["restored_step"], summary["params_sha256"]) == (7, saved.digest)


def _tensors(content: dict[str, Any]) -> list[bytes]:
    """The bytes of all tensors of modules and optimizers."""
    parts = (content["model"], content["optimizer"]["state"])
    return [leaf.numpy().tobytes() for leaf in tree_leaves(parts) if isinstance(leaf, torch.Tensor)]


def test_ranks_that_die_while_saving(launch: Launch, undisturbed: str, folder: Path) -> None:
    run = launch(*options(folder, spares=2), program=["--suicide=7:0", "--suicide=20:2"])
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert len(summary["failures"]) == 2
    assert summary["checkpoints"][-1] == 60
    assert set(contents(folder)) == set(steps(folder))


def test_when_all_copies_in_memory_are_lost_the_newest_file_is_taken(
    launch: Launch, undisturbed: str, folder: Path
) -> None:
    run = launch(*options(folder, every=5, spares=3))
    wait_for("a checkpoint", lambda: folder.exists() and steps(folder))
    active = [entry["pid"] for entry in run.ranks() if entry["role"] == "active"]
    # Stopped first, so that none is left for a moment to hand its copy on.
    for pid in active:
        os.kill(pid, signal.SIGSTOP)
    newest = steps(folder)[-1]
    for pid in active:
        os.kill(pid, signal.SIGKILL)
    summary = run.finish()
    assert summary["params_sha256"] == undisturbed
    assert summary["restored_step"] >= newest
    assert {f["action"] for f in summary["failures"]} == {"substitute"}
    assert "restored from" in run.output


def test_when_all_is_lost_before_the_first_checkpoint_that_is_said(
    launch: Launch, folder: Path
) -> None:
    run = launch(*options(folder, every=50, nproc=1, spares=1), program=["--suicide=7:0"])
    assert "there is no checkpoint" in run.finish(code=3)["reason"]


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    launch: Launch, saved: Saved, folder: Path
) -> None:
    saved.copy(folder)
    newest = Store(folder).committed()[-1].state
    with h5py.File(newest) as content:
        place = content["model/0.weight"].id.get_offset()
    with newest.open("r+b") as file:
        file.seek(place + 100)
        file.write(b"damage")
    run = launch(*options(folder, every=20), program=WIDE)
    summary = run.finish()
    assert "model/0.weight" in run.output
    assert summary["restored_step"] == 8
    assert summary["params_sha256"] == saved.digest
    assert "the checkpoint of step 60 is no good" in run.output


def test_a_checkpoint_of_another_model_is_refused(
    launch: Launch, saved: Saved, folder: Path
) -> None:
    saved.copy(folder)
    run = launch(*options(folder, nproc=2), program=["--width", "16"])
    assert "does not fit this training" in run.finish(code=1)["reason"]


def test_a_training_goes_on_from_what_was_exported_and_imported(
    launch: Launch, saved: Saved, folder: Path, tmp_path: Path
) -> None:
    saved.copy(folder, 60)
    for form, exported in (("dcp", "dcp"), ("safetensors", "model.safetensors")):
        target = str(tmp_path / exported)
        assert main(["ckpt", "export", str(folder), target, "--format", form]) == 0
        assert main(["ckpt", "import", target, str(tmp_path / f"from-{form}")]) == 0
    summary = launch(*options(tmp_path / "from-dcp", every=20), program=WIDE).finish()
    assert (summary["restored_step"], summary["params_sha256"]) == (8, saved.digest)
    # Weights alone are no state to go on from.
    run = launch(*options(tmp_path / "from-safetensors", nproc=1), program=WIDE)
    assert "it holds model, and not model, optimizer" in run.finish(code=1)["reason"]


def test_time_between_checkpoints(launch: Launch, folder: Path) -> None:
    # 60 steps of at least 0.03 s; the last is saved in any case.
    run = launch(*options(folder, every="0.2s", nproc=1), program=["--pace", "0.03"])
    summary = run.finish()
    assert len(summary["checkpoints"]) >= 3
    assert summary["checkpoints"][-1] == 60


def test_some_are_kept_for_longer(launch: Launch, folder: Path) -> None:
    keep = ["--ckpt-keep", "2", "--ckpt-keep-nth", "20", "--ckpt-keep-best", "loss"]
    run = launch(*options(folder, every=3, nproc=2), *keep)
    last = run.finish()["steps"]
    kept = {c.step: c.metrics["loss"] for c in Store(folder).committed()}
    tried = [e["step"] for e in run.events() if e["kind"] == "checkpoint"]
    for_ever = {step for step in tried if step % 20 == 0}
    assert for_ever
    assert len(tried) > len(kept)
    others = kept.keys() - for_ever - set(sorted(tried)[-2:])
    # The one with the least loss, unless it is one of those.
    assert kept.keys() >= for_ever | {last}
    assert len(others) <= 1
    assert all(kept[step] == min(kept.values()) for step in others)


def test_the_script_saves(saved: Saved) -> None:
    assert steps(saved.folder) == [7, 8, 60]
    content = contents(saved.folder)
    for step in (7, 8):
        assert content[step]["optimizer"]["state"][0]["step"].item() == step
        assert content[step]["values"]["seen"] == step * 16


def test_the_script_saves_while_training_goes_on(
    launch: Launch, undisturbed: str, folder: Path
) -> None:
    program = ["--save-at=7", "--save-at=8", "--save-overlap"]
    run = launch(*options(folder, every=1000), program=program)
    assert run.finish()["params_sha256"] == undisturbed
    assert steps(folder) == [7, 8, 60]
    content = contents(folder)[7]
    assert content["optimizer"]["state"][0]["step"].item() == 7
    assert content["values"]["seen"] == 7 * 16


@pytest.mark.parametrize("moment", ["save", "saved"])
def test_a_save_of_the_script_outlives_a_failure(
    launch: Launch, undisturbed: str, folder: Path, moment: str
) -> None:
    program = ["--save-at=7", f"--suicide={moment}:1"]
    summary = launch(*options(folder, every=1000, spares=1), program=program).finish()
    assert summary["params_sha256"] == undisturbed
    # The recovery may have come before it was through; then the next step's end is saved.
    assert steps(folder) in ([7, 60], [8, 60])
    assert len(summary["failures"]) == 1


def test_a_save_of_the_script_out_of_place_is_refused(launch: Launch, folder: Path) -> None:
    run = launch(*options(folder, nproc=1), program=["--save-amid"])
    assert "in the middle of a step" in run.finish(code=1)["reason"]
    run = launch("--nproc", "1", program=["--save-at=3"])
    assert "start with --ckpt-dir" in run.finish(code=1)["reason"] + run.output


def test_one_run_at_a_time_saves_to_a_directory(
    launch: Launch, folder: Path, tmp_path: Path
) -> None:
    end = tmp_path / "end"
    program = ["--steps", "120", "--pace", "0.5", "--until", str(end)]
    first = launch(*options(folder, every=5, nproc=2, spares=1), program=program)
    wait_for("a checkpoint", lambda: folder.exists() and steps(folder))
    refused = launch(*options(folder, nproc=1), "--ckpt-timeout", "1", program=program)
    reason = refused.finish(code=2)["reason"]
    assert f"in use by the run in {first.run_dir} (process {first.entry(0)['pid']} on " in reason
    assert "give another --ckpt-dir" in reason
    patient = launch(*options(folder, nproc=2), program=program)
    wait_for("the second to wait", lambda: "waiting up to 120 s" in patient.output)
    # The lock goes to who plays rank 0 next, and not to who has been waiting for it.
    killed = first.entry(0)["pid"]
    first.send(0)
    wait_for("a successor", lambda: first.entry(0)["pid"] != killed)
    successor = f'"pid": {first.entry(0)["pid"]},'
    wait_for("its lock", lambda: successor in (folder / ".lock").read_text())
    end.touch()
    assert first.finish()["checkpoints"][-1] == 120
    assert patient.finish()["restored_step"] == 120
    assert not (folder / ".lock").exists()


def test_a_directory_that_cannot_be_made_is_said(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = launch(*options(tmp_path / "file" / "checkpoints", nproc=2))
    reason = run.finish(code=1)["reason"]
    assert "the checkpoint directory cannot be made" in reason
    assert "give another --ckpt-dir" in reason
