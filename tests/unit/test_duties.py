"""What ``--spares-do`` takes, and what it is told when it makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcft.errors import UsageError
from hpcft.launch.options import parse

SCRIPT = str(Path(__file__))
SAVES = ["--spares=1", "--ckpt-dir=/tmp/saved"]
NEAR = [*SAVES, "--ckpt-near=5"]


def test_duties_are_taken_once_each() -> None:
    assert parse([*NEAR, "--spares-do", "copies, evaluate,copies", SCRIPT]).spares_do == (
        "copies",
        "evaluate",
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*SAVES, "--spares-do=cook"], "does not know 'cook'; choose from evaluate, copies and"),
        ([*SAVES, "--spares-do=,"], "names nothing to do"),
        (["--ckpt-dir=/tmp/saved", "--spares-do=evaluate"], "there are no spares"),
        (["--spares=1", "--spares-do=evaluate"], "give --ckpt-dir as well"),
        ([*SAVES, "--spares-do=evaluate,copies"], "give --ckpt-near as well"),
        ([*NEAR, "--ckpt-near-copies=xor", "--spares-do=copies"], "--ckpt-near-copies partner"),
        ([*SAVES, "--spares-do=drain"], "give --ckpt-dir and --ckpt-near as well"),
        (["--spares=1", "--spares-do=drain"], "give --ckpt-dir and --ckpt-near as well"),
    ],
)
def test_what_makes_no_sense_is_said(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse([*arguments, SCRIPT])
    assert said in f"{error.value.message}; {error.value.remedy}"
