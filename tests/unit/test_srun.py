"""Which options srun was given, and what Slurm's environment tells."""

from __future__ import annotations

import pytest

from hpcft.slurm.srun import SrunOptions, problems, read_options
from hpcft.slurm.step import find_step, tasks_per_node

SURVIVES = SrunOptions(kill_on_bad_exit=False, no_kill=True, wait=0)


@pytest.mark.parametrize(
    "command",
    [
        "srun --mpi=pmix --kill-on-bad-exit=0 --no-kill --wait=0 python train.py",
        "srun --mpi pmix -N 4 -K0 -k -W0 python train.py",
        "srun --wait 0 --ntasks-per-node 2 -k python train.py -K1",
        "srun --label --no-kill -n 4 --overcommit hpcft run --wait=5 train.py",
        "srun -lk -n4 -- train --kill-on-bad-exit",
    ],
)
def test_options_under_which_a_step_survives(command: str) -> None:
    options = read_options(command.split(), {}, {})
    assert options == SURVIVES
    assert problems(options) == []


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("srun -K -k python train.py", "--kill-on-bad-exit=0"),
        ("srun -K1 -k python train.py", "--kill-on-bad-exit=0"),
        ("srun --kill-on-bad-exit --no-kill python train.py", "--kill-on-bad-exit=0"),
        ("srun -n 4 python train.py --no-kill", "--no-kill"),
        ("srun -k -n 4 --no-kill=off python train.py", "--no-kill"),
        ("srun -k -W 30 python train.py", "--wait=0"),
        ("srun -k --wait=30 python train.py", "--wait=0"),
    ],
)
def test_options_under_which_it_does_not(command: str, missing: str) -> None:
    (problem,) = problems(read_options(command.split(), {}, {}))
    assert problem.startswith(missing)


def test_environment_goes_before_configuration_and_the_command_line_before_both() -> None:
    config = {"KillOnBadExit": "1", "WaitTime": "30 sec"}
    environ = {"SLURM_KILL_BAD_EXIT": "0", "SLURM_NO_KILL": "set", "SLURM_WAIT": "0"}
    bare = ["srun", "python"]
    assert read_options(bare, {}, config) == SrunOptions(True, False, 30)
    assert read_options(bare, environ, config) == SURVIVES
    assert read_options(["srun", "-W9", "python"], environ, config).wait == 9


def test_the_numbers_of_tasks_per_node() -> None:
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="not a list"):
        tasks_per_node("2x3")


def test_a_batch_script_is_no_step() -> None:
    assert find_step({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None


def test_a_task_of_a_step() -> None:
    step = find_step(
        {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "1",
            "SLURM_SRUN_COMM_HOST": "10.0.0.1",
            "SLURM_NODEID": "1",
            "SLURM_PROCID": "3",
            "SLURM_LOCALID": "1",
            "SLURM_STEP_NUM_TASKS": "5",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
            "SLURMD_NODENAME": "n2",
            "PMIX_RANK": "3",
        }
    )
    assert step is not None
    assert (step.task, step.tasks, step.host) == (3, 5, "n2")
    assert (step.task_here, step.tasks_here) == (1, 2)
    assert step.pmix
