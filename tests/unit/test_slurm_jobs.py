"""What Slurm shows of jobs and clusters, and what follows from it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import UsageError
from hpcft.launch.options import parse as parse_run
from hpcft.slurm import naming
from hpcft.slurm.batch import Wanted, warning_time, write
from hpcft.slurm.cluster import Partition, choose, choose_pmix, read_partitions
from hpcft.slurm.job import parse, read_graces, spare
from hpcft.slurm.requeue import Budget
from hpcft.slurm.scontrol import Refused, fields, seconds, tell
from hpcft.telemetry.events import Event

#: As Slurm 22.05 shows it.
RECORD = (
    "JobId=7 ArrayJobId=5 ArrayTaskId=2 JobName=my job UserId=me(1) Priority=4 QOS=(null) "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=3 BatchFlag=1 "
    "TimeLimit=1-00:30:00 Partition=main ExcNodeList=n[3-4] Comment=hpcft: step 3, restart 0 Power="
)


def test_a_record_is_taken_apart() -> None:
    known = fields(RECORD)
    assert known["JobName"] == "my job"
    assert known["Comment"] == "hpcft: step 3, restart 0"
    assert known["Power"] == ""
    assert known["ExcNodeList"] == "n[3-4]"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("30", 30),
        ("30 sec", 30),
        ("05:00", 300),
        ("01:30:00", 5400),
        ("1-00:30:00", 88200),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times(text: str, number: float | None) -> None:
    assert seconds(text) == number


def test_of_an_array_one_task_is_meant() -> None:
    other = RECORD.replace("JobId=7", "JobId=5", 1).replace("ArrayTaskId=2", "ArrayTaskId=9")
    job = parse("7", f"{other}\n{RECORD}\n")
    assert job is not None
    assert (job.number, job.state, job.restarts, job.problem) == ("5_2", "RUNNING", 3, "")
    assert parse("8", RECORD) is None
    assert parse("7", "") is None


@pytest.mark.parametrize(
    ("old", "new", "remedy"),
    [("BatchFlag=1", "BatchFlag=0", "sbatch"), ("Requeue=1", "Requeue=0", "sbatch --requeue")],
)
def test_what_cannot_be_requeued_says_so(old: str, new: str, remedy: str) -> None:
    job = parse("7", RECORD.replace(old, new))
    assert job is not None
    assert remedy in job.problem


def event(kind: str, step: int, **detail: object) -> Event:
    return Event(kind, step, detail=detail)


@pytest.mark.parametrize(
    ("restarts", "events", "lost", "objection"),
    [
        (0, [event("checkpoint", 10)], "", ""),
        (4, [event("restore", 10), event("checkpoint", 20)], "", ""),
        (5, [event("restore", 10), event("checkpoint", 20)], "", "--max-requeue"),
        (0, [], "", "no progress at all"),
        (1, [event("restore", 10)], "", "no progress since step 10"),
        (1, [event("restore", 10), event("checkpoint", 10)], "", "no progress since step 10"),
        (0, [event("failed", 0)], "n3", ""),
        (5, [event("failed", 0)], "n3", "--max-requeue"),
        (0, [event("start", 0), event("failed", 5)], "n3", "no progress at all"),
    ],
)
def test_a_job_is_requeued_only_for_progress_or_when_a_node_was_lost_at_its_start(
    restarts: int, events: list[Event], lost: str, objection: str
) -> None:
    found = Budget(restarts, 5).objection(events, lost.split())
    assert objection in found
    assert bool(objection) == bool(found)


def test_the_time_that_slurm_leaves() -> None:
    config = {"KillWait": "30 sec"}
    script = "#!/bin/bash\n#SBATCH --signal=B:USR1@120   # early\n"
    [limit] = read_graces(script, {"PreemptMode": "OFF"}, config)
    assert (limit.seconds, limit.what) == (150, "the time limit")
    assert read_graces("#SBATCH --signal=USR1\n", {}, config)[0].seconds == 90
    assert read_graces("", {}, config)[0].seconds == 30
    partition = {"PreemptMode": "REQUEUE", "GraceTime": "45"}
    assert [grace.seconds for grace in read_graces(script, partition, config)] == [150, 75]


JOB = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0"}
TASK = {**JOB, "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}


def test_patterns_in_names() -> None:
    assert naming.expand("--run-dir", Path("/r/%A_%a/%j%%"), TASK) == Path("/r/9_3/12%")
    for path, environ in (("/r/%a", JOB), ("/r/%j", {}), ("/r/%x", TASK), ("/r/%", TASK)):
        with pytest.raises(UsageError):
            naming.expand("--run-dir", Path(path), environ)


@pytest.mark.parametrize("path", ["/c/%a", "/c/%A", "/c/task-3/x", "/c/job12"])
def test_tasks_of_an_array_with_directories_of_their_own(path: str) -> None:
    naming.require_own("--ckpt-dir", Path(path), TASK)


def test_tasks_of_an_array_that_share_a_directory_are_told() -> None:
    with pytest.raises(UsageError, match="is the same for all tasks"):
        naming.require_own("--ckpt-dir", Path("/c/model33"), TASK)
    naming.require_own("--ckpt-dir", Path("/c/model33"), JOB)


def test_every_restart_has_a_run_directory_of_its_own() -> None:
    assert naming.run_name(JOB) == "12.0"
    assert naming.run_name({**JOB, "SLURM_RESTART_COUNT": "2"}) == "12.0-r2"
    assert naming.run_name(TASK) == "9_3.0"
    assert naming.run_name({}) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--requeue"], "--ckpt-dir"),
        (["--max-requeue", "3"], "--requeue"),
        (["--requeue", "--max-requeue", "0", "--ckpt-dir", "c"], "1 or more"),
    ],
)
def test_a_requeue_that_makes_no_sense_is_told(
    options: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(UsageError) as told:
        parse_run([*options, __file__])
    assert problem in told.value.line


def test_outside_of_slurm_nothing_can_be_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UsageError, match="batch jobs"):
        parse_run(["--requeue", "--ckpt-dir", "c", __file__])


# -- what a cluster offers ---------------------------------------------------------------------

SHOWN = """\
PartitionName=main AllowGroups=ALL Default=YES GraceTime=0 MaxNodes=UNLIMITED MaxTime=UNLIMITED \
PreemptMode=OFF State=UP TotalCPUs=64 TotalNodes=4
PartitionName=gpu AllowGroups=ALL Default=NO GraceTime=20 MaxNodes=3 MaxTime=02:00:00 \
PreemptMode=CANCEL State=UP TotalCPUs=64 TotalNodes=8
"""
NODES = "main|4|16|(null)\ngpu|6|64+|gpu:a100:4(S:0-1),nvme:2\ngpu|2|48|gpu:8\n"
MAIN, GPU = read_partitions(SHOWN, NODES)


def test_partitions() -> None:
    assert Partition("main", True, True, 4, None, None, False, 16, 0) == MAIN
    assert Partition("gpu", False, True, 8, 3, 7200, True, 48, 4) == GPU
    assert choose(None, [GPU, MAIN]) == MAIN
    assert choose("gpu", [GPU, MAIN]) == GPU
    assert choose("none", [GPU, MAIN]) is None


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("MPI plugin types are...\n\tpmix\n\tnone\nspecific pmix plugin versions: pmix_v4", "pmix"),
        ("srun: MPI types are...\nsrun: pmix_v3\nsrun: pmix_v4\n", "pmix_v4"),
        ("MPI plugin types are...\n\tpmi2\n\tnone\n", None),
    ],
)
def test_what_pmix_is_called(listed: str, name: str | None) -> None:
    assert choose_pmix(listed) == name


def wanted(**changes: object) -> Wanted:
    given: dict[str, object] = {
        "name": "train",
        "nodes": 2,
        "seconds": 3600,
        "ranks_per_node": None,
        "spares": None,
        "spares_why": "",
        "warning": 300,
        "account": None,
        "ckpt_dir": "check points",
        "options": ("--ckpt-every", "500"),
        "target": ("train.py", "--name", "it's me"),
    }
    return Wanted(**{**given, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("partition", [MAIN, GPU])
@pytest.mark.parametrize("changes", [{}, {"ckpt_dir": None, "account": "a"}, {"ranks_per_node": 3}])
def test_scripts_are_well_formed(
    partition: Partition, changes: dict[str, object], tmp_path: Path
) -> None:
    text = write(wanted(**changes), partition, "pmix", "/opt/my env/python", "so it is")
    script = tmp_path / "job.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", str(script)], check=True)
    # What the shell makes of it, with something harmless in srun's place.
    printed = text.replace("exec srun", "printf '%s\\n'")
    done = subprocess.run(
        ["bash", "-uc", printed],
        env={"SLURM_CPUS_PER_TASK": "8"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[-3:] == ["train.py", "--name", "it's me"]
    assert "/opt/my env/python" in words
    assert ("--requeue" in words) == ("check points" in words) == (changes.get("ckpt_dir", 1) == 1)
    assert ("--gpus-per-task=1" in words) == (partition is GPU)


def test_a_rank_a_gpu_and_a_node_of_spares() -> None:
    text = write(wanted(), GPU, "pmix_v4", "python", "so it is")
    for expected in ("--nodes=2 ", "--ntasks-per-node=4 ", "--cpus-per-task=12 ", "@300"):
        assert expected in text
    assert "--spares 4" in text
    text = write(wanted(spares=0, spares_why="none fails"), GPU, "pmix_v4", "python", "so it is")
    assert "# 8 ranks, 0 of them spares: none fails" in text
    assert "--mpi=pmix_v4" in text


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"nodes": 4}, "more than the 3"),
        ({"seconds": 7201}, "which is 02:00:00"),
        ({"spares": 8}, "leaves none of 8"),
        ({"ranks_per_node": 49}, "48 CPUs"),
        ({"seconds": 300}, "nothing is left"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError) as told:
        write(wanted(**changes), GPU, "pmix", "python", "")
    assert problem in told.value.line


def test_the_warning_comes_early_enough_for_what_saves_have_taken() -> None:
    saves = [
        event("checkpoint", 1, path="/c/step-1", seconds=100.0),
        event("checkpoint", 2, path="/other/step-2", seconds=1000.0),
    ]
    assert warning_time(saves, "/c")[0] == 260
    assert warning_time(saves, "/d")[0] == 300
    saves = [event("checkpoint", 1, path="/c/step-1", seconds=0.1)]
    assert warning_time(saves, "/c")[0] == 120


def test_the_end_of_a_job_does_not_end_what_is_told_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Slurm signals all processes of a job, as this does itself.
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\nkill -TERM $$\necho "$@"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert tell("update", "JobId=7") == "update JobId=7\n"


def test_a_controller_that_wants_to_be_asked_again_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    later = "the DB index is being set, try again in a bit"
    scontrol.write_text(
        f'#!/bin/sh\ncd {tmp_path}\nrm first 2>&- || exit 0\necho "{later}" >&2; exit 1\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "first").touch()
    assert tell("update") == ""
    (tmp_path / "first").touch()
    monkeypatch.setattr("hpcft.slurm.scontrol._PATIENCE", -1)
    with pytest.raises(Refused, match="try again"):
        tell("update")


names = st.sampled_from([f"n{i}" for i in range(1, 9)])


@given(st.dictionaries(names, st.booleans()), st.sets(names), st.integers(1, 9))
def test_a_job_does_without_bad_nodes_only_if_enough_others_are_left(
    usable: dict[str, bool], bad: set[str], wanted: int
) -> None:
    spared = set(spare(usable, bad, wanted))
    assert spared <= bad
    if not usable:
        # Nothing is known: it is the user's job to have enough.
        assert spared == bad
        return
    now = {node for node, could in usable.items() if could}
    # It never waits for ever, nor for others if it need not,
    assert len(usable.keys() - spared) >= min(wanted, len(usable))
    assert len(now - spared) >= min(wanted, len(now))
    # and is given no bad node that it need not have.
    assert bad & now <= spared or len(now - spared) <= wanted
    if bad & usable.keys() - now - spared:
        assert len(usable.keys() - spared) <= wanted


def test_of_three_nodes_out_of_four_one_may_be_bad() -> None:
    assert spare({"n1": False, "n2": True, "n3": False, "n4": True}, {"n1", "n3"}, 3) == ["n1"]
