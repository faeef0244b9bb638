"""What a shepherd takes signals for."""

from __future__ import annotations

import signal

import pytest

from hpcft.launch.signals import Meaning, Signals

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("signals", "meanings"),
    [
        # srun passes on what Slurm has sent to all processes already.
        ([(TERM, 0.0), (TERM, 2.9), (TERM, 3.1)], "LEAVE LEAVE END"),
        # A person means it.
        ([(INT, 0.0), (INT, 0.1)], "LEAVE END"),
        ([(TERM, 0.0), (INT, 0.1)], "LEAVE END"),
        # A warning is no end, and no first signal that an end would be the second of.
        ([(USR1, 0.0), (USR1, 9.0), (TERM, 9.1), (USR1, 20.0)], "LEAVE LEAVE LEAVE LEAVE"),
    ],
)
def test_the_second_that_ends_is_meant(signals: list[tuple[int, float]], meanings: str) -> None:
    taken = Signals(can_save=True)
    found = [taken.meaning(number, now, can_leave=True).name for number, now in signals]
    assert found == meanings.split()


def test_who_could_not_leave_in_order_ends_at_once() -> None:
    for number in (TERM, USR1):
        assert Signals(can_save=True).meaning(number, 0.0, can_leave=False) is Meaning.END
    assert Signals(can_save=False).meaning(TERM, 0.0, can_leave=True) is Meaning.END


def test_a_warning_with_nowhere_to_save_to_means_nothing() -> None:
    for can_leave in (False, True):
        assert Signals(can_save=False).meaning(USR1, 0.0, can_leave) is Meaning.NOTHING
