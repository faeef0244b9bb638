"""What is left of memory, by recorded control groups; and when that is short."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.launch import memory
from hpcft.launch.memory import Room, in_groups, on_machine
from hpcft.launch.ration import Patience, Ration, Supply

GIB = 1 << 30
MIB = 1 << 20


def v2(folder: Path, limit: str, used: int, high: str = "max", **stat: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    lines = [f"{name} {value}" for name, value in {"anon": 7, **stat}.items()]
    (folder / "memory.stat").write_text("\n".join(lines) + "\n")
    return folder


def test_what_the_kernel_would_give_up_of_files_counts_as_free(tmp_path: Path) -> None:
    group = v2(tmp_path / "job", str(4 * GIB), 3 * GIB, inactive_file=GIB, active_file=512 * MIB)
    (room,) = in_groups([(group, True)])
    assert (room.limit, room.free) == (4 * GIB, 2 * GIB + 256 * MIB)
    assert str(group) in room.where


def test_a_group_that_slows_its_processes_down_limits_them(tmp_path: Path) -> None:
    group = v2(tmp_path / "job", str(4 * GIB), GIB, high=str(2 * GIB))
    assert [room.free for room in in_groups([(group, True)])] == [GIB]


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group = v2(tmp_path / "job", str(GIB), GIB + 5)
    assert [room.free for room in in_groups([(group, True)])] == [0]


def test_groups_without_a_limit_and_what_is_no_group_say_nothing(tmp_path: Path) -> None:
    group = v2(tmp_path / "job", "max", GIB)
    assert not list(in_groups([(group, True), (tmp_path / "none", True), (tmp_path, False)]))


def test_v1_says_the_same_under_other_names(tmp_path: Path) -> None:
    (tmp_path / "memory.limit_in_bytes").write_text(f"{2 * GIB}\n")
    (tmp_path / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    # Those of the group alone, which has others below it, come first.
    (tmp_path / "memory.stat").write_text(
        f"inactive_file 1\nactive_file 1\ntotal_inactive_file {512 * MIB}\ntotal_active_file 0\n"
    )
    assert [(room.limit, room.free) for room in in_groups([(tmp_path, False)])] == [
        (2 * GIB, GIB + 512 * MIB)
    ]
    (tmp_path / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert not list(in_groups([(tmp_path, False)]))


def test_a_machine_says_what_can_be_had(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text(
        "MemTotal:       1000 kB\nMemFree:  1 kB\nMemAvailable:    400 kB\nHugeTLB: 0\n"
    )
    assert list(on_machine(file)) == [Room(1000 << 10, 400 << 10, "the machine")]
    # As kernels before 3.14 have it.
    file.write_text("MemTotal:       1000 kB\nMemFree:  1 kB\n")
    assert not list(on_machine(file))


def test_the_tightest_limit_counts() -> None:
    room = memory.room()
    assert room is not None
    assert 0 < room.free <= room.limit
    assert memory.pressure() >= 0


def judged(ration: Ration, free: int, now: float, limit: int = 10 * GIB) -> Supply:
    return ration.look(Room(limit, free, "here"), 0.0, now)


@given(st.integers(GIB, 1 << 42), st.floats(0, 1))
def test_memory_that_is_used_evenly_is_short_below_a_part_of_the_limit(
    limit: int, share: float
) -> None:
    ration = Ration()
    free = int(share * limit)
    supplies = [judged(ration, free, now, limit) for now in (0, 0.5, 1, 1.5)]
    assert {supply.short for supply in supplies} == {free < min(limit * 0.1, 2 * GIB)}
    assert ration.short_for == (1.5 if supplies[0].short else 0)


@given(st.floats(50, 2000), st.floats(0.05, 0.5))
def test_it_is_short_a_second_before_it_is_used_up(rate: float, period: float) -> None:
    """However fast it is used, as long as that is seen twice."""
    ration, limit, number = Ration(), 16 * GIB, 0
    while True:
        now = number * period
        left = limit - now * rate * MIB
        assert left > 0
        if judged(ration, int(left), now, limit).short:
            break
        number += 1
    assert left >= 1.0 * rate * MIB


def test_use_that_will_not_go_on_so_is_no_reason() -> None:
    ration = Ration()
    first = ration.look(Room(16 * GIB, 8 * GIB, "here"), 0.0, 0.0, expected=True)
    second = ration.look(Room(16 * GIB, 4 * GIB, "here"), 0.0, 0.5, expected=True)
    assert not first.short
    assert not second.short
    assert judged(Ration(), 8 * GIB, 0.0).last is False


def test_where_all_wait_for_memory_what_seems_free_is_none() -> None:
    room = Room(16 * GIB, 3 * GIB, "here")
    assert not Ration().look(room, 5.0, 0.0).short
    assert Ration().look(room, 50.0, 0.0).short


@given(st.integers(0, 16 * GIB), st.integers(0, 16 * GIB))
def test_what_is_taken_back_is_not_short_at_once_again(free: int, need: int) -> None:
    supply = judged(Ration(), free, 0.0, 16 * GIB)
    if supply.enough_for(need):
        assert not judged(Ration(), free - need, 0.0, 16 * GIB).short


def test_what_is_given_up_again_and_again_comes_back_ever_later() -> None:
    patience, now, waits = Patience(), 0.0, []
    for _ in range(9):
        patience.given_up(now)
        since = now
        while not patience.taken_back(True, now):
            now += 0.5
        waits.append(now - since)
        now += 1
    assert waits == [15, 30, 60, 120, 240, 300, 300, 300, 300]
    # After a long time in which it was kept it is as at first.
    now += 3600
    patience.given_up(now)
    assert not patience.taken_back(True, now)
    assert patience.taken_back(True, now + 15)


def test_enough_has_to_be_there_all_the_time() -> None:
    patience = Patience()
    assert not patience.taken_back(True, 0)
    assert not patience.taken_back(False, 4)
    assert not patience.taken_back(True, 16)
    assert not patience.taken_back(True, 30)
    assert patience.taken_back(True, 31)


@pytest.mark.parametrize(("turn", "seconds"), [(0, 15), (2, 45)])
def test_spares_of_a_machine_come_back_one_after_another(turn: int, seconds: int) -> None:
    patience = Patience()
    assert not patience.taken_back(True, 0, turn)
    assert not patience.taken_back(True, seconds - 1, turn)
    assert patience.taken_back(True, seconds, turn)
