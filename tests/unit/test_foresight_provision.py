"""How many spares are best, of the nodes that there are."""

from __future__ import annotations

import pytest

from hpcft.foresight.provision import provision
from hpcft.foresight.scenario import DAY, HOUR


def test_where_hardly_anything_fails_a_spare_is_a_node_that_does_nothing() -> None:
    found = provision(8, 4, 4 * HOUR, True, 1000 * DAY)
    assert found.spares == 0
    assert "with one more spare node" in found.why


def test_where_fewer_cannot_go_on_some_are_kept_and_more_for_more_failures() -> None:
    def spares(nodes: int, between: float) -> int:
        return provision(nodes, 8, 2 * DAY, True, between, shrinks=False).spares

    often, seldom = spares(256, 20 * DAY), spares(256, 400 * DAY)
    assert often > seldom > 0
    assert spares(16, 400 * DAY) == 0


def test_what_is_chosen_is_the_best_of_what_can_be_had() -> None:
    # By hand: 10 nodes of which 9 are needed, one fails in the middle, and is not back in time.
    short = provision(10, 1, 2 * HOUR, False, 10 * HOUR, at_least=9, shrinks=False)
    assert short.spares == 1
    all_needed = provision(10, 1, 2 * HOUR, False, 10 * HOUR, at_least=10)
    assert all_needed.spares == 0
    assert all_needed.part < short.part


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_somebody_trains(nodes: int) -> None:
    assert provision(nodes, 1, HOUR, False, HOUR).spares < nodes
