"""The membership that each process works out for itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import TooFewRanks
from hpcft.world.link import Failure
from hpcft.world.membership import Membership, Policy
from hpcft.world.succession import succeed

HOSTS = {world: f"n{world // 2}" for world in range(8)}


@given(st.permutations(range(8)), st.lists(st.integers(0, 3), min_size=8, max_size=8), st.data())
def test_it_does_not_depend_on_the_order_in_which_deaths_become_known(
    order: list[int], times: list[int], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, 6))
    deaths = [Failure(world, "", times[world], 0.0) for world in order[:count]]
    base = Membership.launch(8, 3)
    healings = succeed(base, deaths, HOSTS, Policy())
    again = succeed(base, data.draw(st.permutations(deaths)), HOSTS, Policy())
    assert [h.after for h in healings] == [h.after for h in again]
    assert len(healings) == count
    after = healings[-1].after if healings else base
    assert after.epoch == count
    assert set(after.members) == set(range(8)) - set(order[:count])
    # As long as there are spares every rank is played.
    assert len(after.active) == min(5, 8 - count)
    # Who is left keeps the place it has, as long as nobody is missing.
    if len(after.active) == 5:
        for logical, world in enumerate(base.active):
            assert world in order[:count] or after.active[logical] == world


def test_too_few() -> None:
    base = Membership.launch(2, 0)
    deaths = [Failure(1, "", 0.0, 0.0)]
    assert succeed(base, deaths, HOSTS, Policy())[0].action == "shrink"
    with pytest.raises(TooFewRanks, match="1 ranks are left"):
        succeed(base, deaths, HOSTS, Policy(min_ranks=2))
