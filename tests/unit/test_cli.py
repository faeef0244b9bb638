"""The hpcft command, and what importing the package costs."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from hpcft.cli.main import main
from hpcft.errors import HpcftError, UsageError


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "hpcft run --nproc 4 --spares 1 train.py" in text
    assert "doctor" in text


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere.py"], "there is no script nowhere.py"),
        (["-m", "no_such_module_anywhere"], "there is no module"),
        (["--spares", "2", "-m", "this"], "--spares is given without --nproc"),
        (["--nproc", "0", "-m", "this"], "--nproc 0 makes no sense"),
        (["--nproc", "2", "--min-ranks", "3", "-m", "this"], "--min-ranks 3 is more than"),
        (["--on-failure", "pray", "-m", "this"], "does not know 'pray'"),
    ],
)
def test_wrong_usage_of_run_is_one_line(
    argv: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *argv]) == 2
    error = capfd.readouterr().err
    assert error.startswith("hpcft: ")
    assert says in error
    assert error.count("\n") == 1


def test_importing_hpcft_starts_neither_torch_nor_mpi() -> None:
    program = "import hpcft, hpcft.run, sys; print({'torch', 'mpi4py', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_errors_keep_their_remedy() -> None:
    error = UsageError("it is wrong", "do it right")
    again = pickle.loads(pickle.dumps(error))
    assert again.line == "it is wrong; do it right"
    assert isinstance(again, HpcftError)
