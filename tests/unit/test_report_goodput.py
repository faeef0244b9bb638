"""Where a run's time went: the parts sum up to the whole, whatever has happened."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import T0, event, eventful, failure, leave, resume, start, status, steps

from hpcft.report import record
from hpcft.report.goodput import Goodput
from hpcft.report.record import Chapter
from hpcft.report.spans import cut, launches, trim
from hpcft.report.story import Story, tell
from hpcft.telemetry.events import Event
from hpcft.telemetry.laps import Lap

times = st.floats(T0, T0 + 1000, allow_nan=False)
numbers = st.integers(0, 50)
#: What kinds of events say; of the others, of which ``recovered`` is one, any detail will do.
details: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "start": st.fixed_dictionaries({"active": st.integers(1, 4), "spares": st.integers(0, 2)}),
    "failure": st.fixed_dictionaries(
        {
            "role": st.sampled_from(["active", "spare"]),
            "world": st.integers(0, 5),
            "host": st.just("n1"),
            "cause": st.just("killed"),
            "detect_s": st.just(0.1),
        }
    ),
    "resume": st.fixed_dictionaries(
        {
            "action": st.sampled_from(["substitute", "shrink", "substitute+shrink", "none"]),
            "active": st.integers(1, 4),
            "spares": st.integers(0, 2),
            "recover_s": st.floats(0, 2000),
            "lost_steps": st.none() | numbers,
            "phases": st.just({}),
        }
    ),
    "recovered": st.fixed_dictionaries({"stall_s": st.floats(0, 9)}),
    "adoption": st.fixed_dictionaries({"world": st.integers(0, 5), "host": st.just("n1")}),
    "shrink": st.just({"from": 3, "to": 2}),
    "relaunch": st.just({"reason": "all gone"}),
    "resize": st.just({"reason": "more"}),
    "failed": st.just({"reason": "too few"}),
    "interrupted": st.just({"reason": "SIGTERM"}),
    "checkpoint": st.just({"path": "ck/1"}),
    "restore": st.just({"path": "ck/1"}),
}
kinds = [*details, "finish", "requeue", "detection", "save failed", "damaged", "layout"]


@st.composite
def any_event(draw: st.DrawFn) -> Event:
    kind = draw(st.sampled_from(kinds))
    ranks = draw(st.lists(st.integers(0, 4), max_size=2, unique=True))
    detail = draw(details.get(kind, st.just({})))
    epoch = draw(st.integers(0, 3))
    return Event(kind, draw(numbers), tuple(ranks), epoch, draw(times), detail)


@st.composite
def any_lap(draw: st.DrawFn) -> Lap:
    first = draw(st.integers(1, 50))
    count = draw(st.integers(1, 10))
    world, rank = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    began, length = draw(times), draw(st.floats(0, 300))
    parts = [draw(st.floats(0, 100)) for _ in range(3)]
    return Lap(
        world, rank, 0, first, first + count - 1, began, began + length, *parts, {-20: count}
    )


def check(parts: Goodput) -> None:
    assert sum(parts.parts.values()) == pytest.approx(parts.whole, abs=1e-4)
    assert all(seconds >= 0 for seconds in parts.parts.values())
    assert 0 <= parts.part <= 1 + 1e-9
    assert 0 <= parts.measured <= 1


@settings(max_examples=200)
@given(
    st.lists(st.lists(any_event(), max_size=15), min_size=1, max_size=3),
    st.lists(any_lap(), max_size=20),
    st.booleans(),
)
def test_the_parts_sum_up_to_the_whole(
    chapters: list[list[Event]], all_laps: list[Lap], live: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = ["17.0", "17.0-r1", "17.0-r2"][: len(chapters)]
        for name, events in zip(names, chapters, strict=True):
            leave(Path(folder, name), events, all_laps)
        known = status(state="training" if live else "failed", ended=not live)
        told = tell(Path(folder, names[-1]), known)
    check(told.goodput)
    if told.spans:
        assert told.begun is not None
        assert told.heard is not None
        assert told.goodput.whole == pytest.approx(told.heard - told.begun, abs=1e-4)
    for one, other in zip(told.spans, told.spans[1:], strict=False):
        assert one.end == pytest.approx(other.begin, abs=1e-6)


@given(st.lists(any_event(), max_size=20))
def test_spans_have_neither_gap_nor_overlap(events: list[Event]) -> None:
    heard = max([T0, *(event.time for event in events)])
    chapter = Chapter(Path(), T0, heard, tuple(events))
    spans = cut([chapter])
    everything = launches([chapter])
    assert all(0 <= span.launch < len(everything) for span in spans)
    assert trim(spans, everything, {}) is not None
    at = T0
    for span in spans:
        assert span.begin == pytest.approx(at, abs=1e-6)
        at = span.end
    assert at == pytest.approx(heard, abs=1e-6)


def told(path: Path, **changes: Any) -> Story:
    return tell(path, status(**changes))


def test_every_part_of_an_eventful_run(tmp_path: Path) -> None:
    parts = told(eventful(tmp_path / "run", {"loss": 1.0})).goodput
    check(parts)
    assert parts.whole == pytest.approx(65.5)
    assert parts.starting == pytest.approx(10)
    assert parts.recovery == pytest.approx(0.2)
    # From the failure to the first step of the next launch.
    assert parts.relaunch == pytest.approx(4.8)
    assert parts.ending == pytest.approx(0.5)
    # Steps 101 to 150.
    assert parts.again == pytest.approx(10, rel=0.05)
    # Two of three ranks wait 0.16 s in a step; the slow one waits 0.02 s, and so must all.
    counted = 40
    assert parts.waiting == pytest.approx(counted / 0.2 * 2 / 3 * 0.14, rel=0.05)
    assert parts.steps == pytest.approx(counted - parts.waiting, rel=0.05)
    assert (parts.saving, parts.restart, parts.resize) == (0, 0, 0)
    assert parts.measured == 1


def test_saving_and_the_time_between_restarts(tmp_path: Path) -> None:
    leave(
        tmp_path / "17.0",
        [
            start(0, 2),
            event("checkpoint", 20, 100, path="ck/100"),
            event("interrupted", 20, 100, reason="SIGUSR1", newest=100),
            event("requeue", 21, 100, requeued=True, why="", excluded=[]),
        ],
        *(steps(rank, 1, 100, 0, compute=0.1, saving=0.1) for rank in range(2)),
    )
    last = leave(
        tmp_path / "17.0-r1",
        [
            start(70, 2, restarts=1),
            event("restore", 71, 100, path="ck/100"),
            event("finish", 81, 200),
        ],
        *(steps(rank, 101, 200, 71) for rank in range(2)),
    )
    story = told(last, begun=T0 + 60)
    parts = story.goodput
    check(parts)
    assert parts.restart == pytest.approx(39)
    assert parts.starting == pytest.approx(11)
    assert parts.saving == pytest.approx(10)
    assert parts.ending == pytest.approx(1)
    assert parts.steps == pytest.approx(20)
    assert "Slurm started the job again once." in story.words
    assert [one.then for one in story.incidents if one.kind == "restart"] == [
        "went on from step 100"
    ]


def test_a_run_without_laps_and_one_that_still_runs(tmp_path: Path) -> None:
    path = leave(tmp_path / "run", [start(10, 2)])
    story = told(path, state="training", ended=False, now=T0 + 30)
    check(story.goodput)
    assert (story.goodput.starting, story.goodput.steps) == (10, 20)
    assert any("left no laps" in note for note in story.notes)
    assert "under way" in story.words[0]


def test_what_the_last_laps_do_not_tell_is_like_what_they_do(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [start(0, 2)],
        steps(0, 1, 100, 0, compute=0.05, waiting=0.05),
        steps(1, 1, 100, 0, compute=0.1),
    )
    parts = told(path, state="training", ended=False, now=T0 + 20).goodput
    check(parts)
    assert parts.measured == pytest.approx(0.5, abs=0.01)
    assert parts.waiting == pytest.approx(5, rel=0.02)


def test_a_relaunch_that_goes_on_from_nowhere_loses_all(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [
            start(0, 1),
            failure(10, 100, 0, 0, 1),
            event("relaunch", 10, 100, reason="all ranks failed"),
            start(11, 1),
            event("finish", 21, 100),
        ],
        steps(0, 1, 100, 0),
        steps(0, 1, 100, 11),
    )
    parts = told(path).goodput
    check(parts)
    assert parts.again == pytest.approx(10)
    assert parts.steps == pytest.approx(10)


def test_a_relaunch_that_is_ended_before_it_has_restored_loses_nothing(tmp_path: Path) -> None:
    """Nor does one that fails on the way, and is made again."""
    begun = [
        start(0, 1),
        failure(10, 100, 0, 0, 1),
        event("relaunch", 10, 100, reason="all ranks failed"),
        start(11, 1),
        failure(12, 100, 0, 0, 1),
        event("relaunch", 12, 100, reason="all ranks failed"),
        start(13, 1),
    ]
    ended = [*begun, event("failed", 14, 100, reason="a wish to end")]
    parts = told(leave(tmp_path / "ended", ended, steps(0, 1, 100, 0))).goodput
    check(parts)
    assert parts.again == 0
    gone_on = [*begun, event("restore", 13.5, 80, path="ck/80"), event("finish", 24, 180)]
    laps = [*steps(0, 1, 100, 0), *steps(0, 81, 180, 14)]
    parts = told(leave(tmp_path / "gone on", gone_on, laps)).goodput
    check(parts)
    assert parts.again == pytest.approx(2, abs=0.2)


def test_the_failure_of_a_spare_costs_nothing(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [start(0, 1, 1), failure(5, 50, None, 1, 0), event("finish", 10, 100)],
        steps(0, 1, 100, 0),
    )
    story = told(path)
    assert story.goodput.steps == pytest.approx(10)
    assert "No rank failed." in story.words
    assert any("1 spare failed" in said for said in story.words)


def test_a_recovery_counts_from_the_failure(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [
            start(0, 2),
            failure(5, 50, 1, 1, 1),
            resume(7, 50, 1, "shrink", 1, 0),
            event("finish", 12, 100),
        ],
        steps(0, 1, 50, 0),
        steps(0, 51, 100, 7, epoch=1),
    )
    story = told(path)
    assert story.goodput.recovery == pytest.approx(2)
    assert "At the end 1 rank trained." in story.words


def test_damaged_laps_are_passed_over(tmp_path: Path) -> None:
    path = eventful(tmp_path / "run", {"loss": 1.0})
    before = told(path).goodput
    with (path / "laps" / "rank-0.jsonl").open("a") as file:
        file.write('{"world": 0}\n[]\n{"world": 0, "rank": 0, "ep\n')
    with (path / "laps" / "rank-1.jsonl").open("ab") as file:
        file.write(b"\xff\x00\n")
    assert told(path).goodput == before


def test_restarts_are_told_by_their_names() -> None:
    from hpcft.slurm.naming import names_before

    assert names_before("17.0-r2") == ["17.0", "17.0-r1"]
    assert names_before("17_4.0-r1") == ["17_4.0"]
    assert names_before("17.0") == names_before("mine-r2") == []


def test_a_read_run_knows_its_chapters(tmp_path: Path) -> None:
    leave(tmp_path / "9.0", [start(0, 1), event("interrupted", 5, 3, reason="x", newest=3)])
    leave(tmp_path / "9.0-r1", [])
    last = leave(tmp_path / "9.0-r2", [start(20, 1, restarts=2), event("finish", 30, 9)])
    read = record.read(last, status(begun=None))
    assert [chapter.path.name for chapter in read.chapters] == ["9.0", "9.0-r2"]
    assert [chapter.heard for chapter in read.chapters] == [T0 + 5, T0 + 30]
