"""The healing of a membership, through random schedules of failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.errors import StateLost, TooFewRanks
from hpcft.world.membership import Membership, Policy, heal
from hpcft.world.recovery import Report, Transfer, _stepping_down, plan_transfer


def test_a_spare_takes_exactly_the_failed_rank() -> None:
    healing = heal(
        Membership.launch(5, 1), frozenset({0, 1, 3, 4}), dict.fromkeys(range(5), "n"), Policy()
    )
    assert healing.after == Membership(1, (0, 1, 4, 3), ())
    assert healing.action == "substitute"


def test_without_spares_the_ranks_above_move_down() -> None:
    healing = heal(
        Membership.launch(4, 0), frozenset({0, 2, 3}), dict.fromkeys(range(4), "n"), Policy()
    )
    assert healing.after == Membership(1, (0, 2, 3), ())
    assert healing.dropped == (1,)
    assert healing.action == "shrink"


def test_a_spare_on_another_node_is_preferred() -> None:
    hosts = {0: "a", 1: "b", 2: "b", 3: "a"}
    healing = heal(Membership.launch(4, 2), frozenset({0, 2, 3}), hosts, Policy())
    assert healing.after.active == (0, 3)


def test_a_spare_on_the_same_node_is_better_than_none() -> None:
    hosts = {0: "a", 1: "b", 2: "b"}
    healing = heal(Membership.launch(3, 1), frozenset({0, 2}), hosts, Policy())
    assert healing.after.active == (0, 2)


@pytest.mark.parametrize(
    "policy", [Policy(min_ranks=2), Policy(shrink=False), Policy(substitute=False, shrink=False)]
)
def test_too_few_ranks_are_told_with_a_remedy(policy: Policy) -> None:
    with pytest.raises(TooFewRanks) as caught:
        heal(Membership.launch(2, 0), frozenset({1}), {0: "a", 1: "a"}, policy)
    assert "--" in caught.value.remedy


def test_losing_only_a_spare_changes_no_rank() -> None:
    healing = heal(
        Membership.launch(3, 1), frozenset({0, 1}), dict.fromkeys(range(3), "n"), Policy()
    )
    assert healing.after == Membership(1, (0, 1), ())
    assert healing.spares_lost == (2,)
    assert healing.action == "none"


@given(st.data())
def test_any_schedule_of_failures_keeps_the_world_sound(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 24), "size")
    spares = data.draw(st.integers(0, size - 1), "spares")
    hosts = {w: data.draw(st.sampled_from("abcd")) for w in range(size)}
    policy = Policy(
        data.draw(st.booleans(), "substitute"),
        data.draw(st.booleans(), "shrink"),
        data.draw(st.integers(1, size - spares), "min_ranks"),
    )
    membership = Membership.launch(size, spares)
    while membership.members:
        alive = frozenset(
            data.draw(st.sets(st.sampled_from(membership.members)), f"epoch {membership.epoch}")
        )
        if alive == set(membership.members):
            break
        try:
            healing = heal(membership, alive, hosts, policy)
        except TooFewRanks:
            lost = len([w for w in membership.active if w not in alive])
            left = [w for w in membership.spares if w in alive] if policy.substitute else []
            assert lost > len(left)
            break
        after = healing.after
        assert after.epoch == membership.epoch + 1
        assert set(after.members) == alive
        assert len(after.active) >= policy.min_ranks
        assert len(set(after.members)) == len(after.members)
        # Who was active stays active, and keeps the order.
        kept = [w for w in membership.active if w in alive]
        assert [w for w in after.active if w in kept] == kept
        if not healing.dropped:
            for logical, world in enumerate(membership.active):
                if world in alive:
                    assert after.active[logical] == world
        elif policy.substitute:
            assert not after.spares
        membership = after


@given(st.data())
def test_the_state_taken_is_the_most_advanced_whole_one(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    membership = Membership(1, tuple(range(size)), ())
    reports = {
        w: Report(w, data.draw(st.sampled_from([-1, 6, 7])), data.draw(st.booleans()), False)
        for w in range(size)
    }
    holders = [r for r in reports.values() if r.step >= 0]
    if not holders:
        with pytest.raises(StateLost):
            plan_transfer(membership, reports)
        return
    plan = plan_transfer(membership, reports)
    source = reports[membership.active[plan.source]]
    assert (source.whole, source.step) == max((r.whole, r.step) for r in holders)
    assert plan.step == source.step
    assert plan.source not in plan.receivers
    for logical in set(range(size)) - {plan.source} - set(plan.receivers):
        report = reports[membership.active[logical]]
        assert report.step == plan.step
        assert report.whole


def test_before_the_first_step_everybody_receives() -> None:
    reports = {w: Report(w, 0, True, False) for w in range(3)}
    assert plan_transfer(Membership(1, (0, 1, 2), ()), reports).receivers == (1, 2)


def test_scripts_are_run_anew_where_nothing_can_be_moved() -> None:
    membership = Membership(1, (0, 3), ())

    def plan(*reports: Report, restorable: bool) -> Transfer:
        return plan_transfer(membership, {r.world: r for r in reports}, restorable)

    spare = Report(3, -1, True, False)
    shards = Report(0, 7, True, True, anew=True)
    assert plan(shards, spare, restorable=True) == Transfer(0, (), -1, 7, anew=True)
    with pytest.raises(StateLost):
        plan(shards, spare, restorable=False)
    # Before the first step there is nothing to lose.
    setting_up = Report(0, 0, True, True, anew=True)
    assert plan(setting_up, spare, restorable=False) == Transfer(0, (), -1, 0, anew=True)
    without_a_state = Report(0, 0, True, True)
    assert plan(without_a_state, spare, restorable=False).anew
    # Whatever those have lost who are gone.
    last = Report(3, -1, True, False, anew=True)
    assert plan(Report(0, -1, True, False), last, restorable=True).anew
    with pytest.raises(StateLost):
        plan(Report(0, -1, True, False), last, restorable=False)


ONE_HOST = dict.fromkeys(range(8), "n")


def test_who_steps_down_changes_places_with_a_spare() -> None:
    before = Membership(3, (0, 1, 2), (3, 4))
    everybody = frozenset(range(5))
    healing = heal(before, everybody, ONE_HOST, Policy(), frozenset({1}), frozenset({1}))
    assert healing.after == Membership(4, (0, 3, 2), (1, 4))
    assert [(one.logical, one.world, one.failed) for one in healing.replaced] == [(1, 3, 1)]
    assert (healing.action, healing.dead, healing.dropped) == ("replace", [], ())


def test_nobody_steps_down_for_a_spare_that_is_slow_itself() -> None:
    before = Membership(3, (0, 1, 2), (3,))
    slow = frozenset({1, 3})
    healing = heal(before, frozenset(range(4)), ONE_HOST, Policy(), slow, frozenset({1}))
    assert healing.after == Membership(4, (0, 1, 2), (3,))
    assert healing.action == "none"


def test_a_slow_spare_comes_last_and_is_better_than_none() -> None:
    before = Membership(3, (0, 1, 2), (3, 4))
    slow = frozenset({3})
    healing = heal(before, frozenset({0, 2, 3, 4}), ONE_HOST, Policy(), slow)
    assert healing.after.active == (0, 4, 2)
    healing = heal(healing.after, frozenset({0, 2, 3}), ONE_HOST, Policy(), slow)
    assert healing.after.active == (0, 3, 2)


def test_where_somebody_has_died_nobody_steps_down() -> None:
    before = Membership(3, (0, 1, 2), (3, 4))
    healing = heal(
        before, frozenset({0, 1, 3, 4}), ONE_HOST, Policy(), frozenset({1}), frozenset({1})
    )
    assert healing.after == Membership(4, (0, 1, 3), (4,))
    assert healing.replaced == ()


def test_who_takes_over_is_on_another_host_if_there_is_one() -> None:
    hosts = {0: "a", 1: "b", 2: "b", 3: "c"}
    before = Membership(0, (0, 1), (2, 3))
    healing = heal(before, frozenset(range(4)), hosts, Policy(), frozenset({1}), frozenset({1}))
    assert healing.after == Membership(1, (0, 3), (1, 2))


@given(st.data())
def test_any_schedule_of_deaths_and_replacements_keeps_the_world_sound(
    data: st.DataObject,
) -> None:
    size = data.draw(st.integers(2, 16), "size")
    spares = data.draw(st.integers(0, size - 1), "spares")
    hosts = {w: data.draw(st.sampled_from("abcd")) for w in range(size)}
    membership = Membership.launch(size, spares)
    for _ in range(8):
        members = st.sets(st.sampled_from(membership.members))
        dead = data.draw(members, "dead") if data.draw(st.booleans()) else set()
        slow, leaving = frozenset(data.draw(members, "slow")), frozenset(data.draw(members))
        alive = frozenset(set(membership.members) - dead)
        try:
            healing = heal(membership, alive, hosts, Policy(), slow, leaving)
        except TooFewRanks:
            assert not alive
            break
        after = healing.after
        assert set(after.members) == alive
        assert not set(after.active) & set(after.spares)
        assert len(set(after.active)) == len(after.active)
        assert after.spares == tuple(sorted(after.spares))
        for one in healing.replaced:
            assert not dead & set(membership.active)
            assert one.failed in leaving & set(after.spares)
            assert one.world not in slow
            assert after.active[one.logical] == one.world
            assert membership.active[one.logical] == one.failed
        if not dead:
            assert len(after.active) == len(membership.active)
            # Somebody is left who has the state.
            assert set(after.active) & set(membership.active)
        membership = after


def test_nobody_steps_down_who_alone_has_the_state() -> None:
    before = Membership(0, (0, 1), (2,))
    leaving = Report(1, 7, True, False, steps_down=True)
    whole, broken = Report(0, 6, True, False), Report(0, 6, True, True)
    spare = Report(2, -1, True, False)
    for other, expected in ((whole, {1}), (broken, set())):
        reports = {0: other, 1: leaving, 2: spare}
        assert _stepping_down(before, reports) == expected


def test_a_warm_spare_is_adopted_before_a_cold_one() -> None:
    hosts = dict.fromkeys(range(5), "n")
    before = Membership.launch(5, 2)
    alive = frozenset({0, 2, 3, 4})
    assert heal(before, alive, hosts, Policy(), cold=frozenset({3})).after.active == (0, 4, 2)
    # But one that is slow would be so for good.
    healing = heal(before, alive, hosts, Policy(), frozenset({4}), cold=frozenset({3}))
    assert healing.after.active == (0, 3, 2)


def test_of_spares_that_are_as_warm_the_one_with_memory_is_adopted() -> None:
    hosts = {0: "a", 1: "b", 2: "c", 3: "d", 4: "b"}
    before, alive = Membership.launch(5, 2), frozenset({0, 2, 3, 4})
    for cold in (frozenset[int](), frozenset({3, 4})):
        for tight, adopted in ((set[int](), 3), ({3}, 4), ({4}, 3), ({3, 4}, 3)):
            healing = heal(before, alive, hosts, Policy(), cold=cold, tight=frozenset(tight))
            assert healing.after.active == (0, adopted, 2)
    # One that is warm has all that it needs.
    healing = heal(before, alive, hosts, Policy(), cold=frozenset({4}), tight=frozenset({3}))
    assert healing.after.active == (0, 3, 2)


def test_a_slow_rank_changes_places_with_a_warm_spare() -> None:
    before, alive = Membership.launch(4, 2), frozenset(range(4))
    slow = frozenset({1})
    healing = heal(before, alive, ONE_HOST, Policy(), slow, slow, frozenset({2}))
    assert healing.after.active == (0, 3)
