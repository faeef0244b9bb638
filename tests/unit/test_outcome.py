"""What a launch comes to, by how its ranks have ended."""

from __future__ import annotations

import pytest

from hpcft.errors import INTERRUPTED
from hpcft.launch.cause import Death, Ending
from hpcft.launch.outcome import Outcome


def dead(*deaths: Death) -> Outcome:
    outcome = Outcome()
    for death in deaths:
        outcome.died(death)
    return outcome


def test_if_all_fail_the_first_speaks() -> None:
    outcome = dead(Death(0, "", 20.0), Death(1, "exit code 5", 10.0, 5))
    outcome.explained(0, "killed by SIGSEGV", 139)
    assert (outcome.code, outcome.lost, outcome.resizes) == (5, True, False)
    assert outcome.why() == "all ranks failed, the last: killed by SIGSEGV"
    assert [death.rank for death, _ in outcome.deaths()] == [1, 0]
    assert outcome.raised() is None


def test_only_exceptions_and_exit_codes_are_raised() -> None:
    assert dead(Death(3, "", 2.0, 1), Death(2, "", 1.0, 7)).raised() == 2
    assert Outcome().raised() is None


def test_who_fails_when_training_is_over_decides_and_deaths_before_do_not() -> None:
    outcome = dead(Death(0, "killed", 1.0))
    outcome.ended(1, Ending(0, ""))
    assert (outcome.code, outcome.lost) == (0, False)
    outcome.ended(2, Ending(4, "exit code 4"))
    assert outcome.code == 4
    assert outcome.why() == "rank 2 failed after the training was over: exit code 4"


@pytest.mark.parametrize(
    ("wish", "decided", "resizes"), [("", None, True), ("SIGTERM", None, False), ("", 143, False)]
)
def test_ranks_leave_to_be_resized_unless_the_run_is_to_end(
    wish: str, decided: int | None, resizes: bool
) -> None:
    outcome = Outcome()
    outcome.ended(0, Ending(INTERRUPTED, ""))
    outcome.wish, outcome.decided = wish, decided
    assert outcome.resizes is resizes
    assert outcome.code == (INTERRUPTED if decided is None else decided)
