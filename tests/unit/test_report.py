"""``hpcft report``: what it tells of a run, and what it says where there is nothing to tell."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import T0, event, eventful, failure, leave, start, status, steps

from hpcft.cli.main import main
from hpcft.report.amounts import duration, percent, short
from hpcft.report.curves import curves
from hpcft.report.drawing import MOST_ROWS, nice
from hpcft.report.incidents import incidents
from hpcft.report.pace import Reading
from hpcft.report.page import draw
from hpcft.report.record import Chapter
from hpcft.report.story import Story, tell
from hpcft.telemetry.rundir import RunDirectory

NASTY = "</script><img src=x onerror=alert(1)>\"'&"


class Elements(HTMLParser):
    """What is in a page: its tags with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def json_of(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["report", str(path), "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_the_page_is_where_it_says_and_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = eventful(tmp_path / "run", {"loss": 1.0, "lr": 0.1})
    assert main(["report", str(path)]) == 0
    output = Path(capsys.readouterr().out.strip())
    assert output == path / "report.html"
    page = Elements(output.read_text())
    assert {mark for mark in page.having("data-mark") if mark} == {
        *("failure", "adoption", "relaunch", "restore", "checkpoint", "slow", "end")
    }
    links = [value for name in ("src", "href") for value in page.having(name) if value]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(http" not in output.read_text()

    elsewhere = tmp_path / "page.html"
    assert main(["report", str(path), "--output", str(elsewhere)]) == 0
    assert capsys.readouterr().out.strip() == str(elsewhere)
    assert main(["report", str(path), "--output", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["page.html", "run"]


def test_json_has_what_the_page_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = eventful(tmp_path / "run", {"loss": 1.0, "lr": 0.1})
    told = json_of(path, capsys)
    page = Elements(draw(tell(path, status(begun=None, step=200))))
    assert [curve["name"] for curve in told["curves"]] == ["loss", "lr"]
    assert page.having("data-name") == ["loss", "lr"]
    assert len(page.having("data-incident")) == len(told["incidents"])
    assert page.having("data-rank") == [f"rank {rank['rank']}" for rank in told["ranks"]]
    marks = told["timeline"]["run"] + [m for row in told["timeline"]["rows"] for m in row["marks"]]
    # In the timeline; curves have some of them, too.
    assert len(page.having("data-mark")) >= len(marks)
    assert told["words"][0] in re.sub(r"\s+", " ", page.text)
    parts = told["goodput"]
    assert parts["part"] == pytest.approx(parts["steps"] / parts["whole"])
    assert told["state"] == "ok"
    assert told["step"] == 200

    file = tmp_path / "told.json"
    assert main(["report", str(path), "--json", "--output", str(file)]) == 0
    assert json.loads(file.read_text())["words"] == told["words"]


def test_who_played_which_rank(tmp_path: Path) -> None:
    story = tell(eventful(tmp_path / "run", {}), status())
    rows = {
        row.name: [(stay.launch, stay.world, stay.begin - T0, stay.end - T0) for stay in row.stays]
        for row in story.timeline.rows
    }
    assert list(rows) == ["rank 0", "rank 1", "rank 2", "spare 3"]
    assert [stay[:2] for stay in rows["rank 2"]] == [(0, 2), (0, 3), (1, 2)]
    assert rows["rank 2"][0][2:] == pytest.approx((9, 20))
    assert rows["rank 2"][1][2:] == pytest.approx((20.2, 40.2))
    assert [stay[:2] for stay in rows["spare 3"]] == [(0, 3), (1, 3)]
    assert story.ranks[2].processes == ("2", "3", "2:2")
    assert story.ranks[2].hosts == ("n2", "n3")


def test_after_a_shrink_ranks_are_numbered_anew(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [
            start(0, 3),
            failure(5, 50, 0, 0, 1),
            event("shrink", 5.1, 50, 0, epoch=1, **{"from": 3, "to": 2}),
            event("finish", 10, 100),
        ],
    )
    rows = {row.name: row for row in tell(path, status()).timeline.rows}
    assert [stay.world for stay in rows["rank 0"].stays] == [0, 1]
    assert [stay.world for stay in rows["rank 1"].stays] == [1, 2]
    assert [stay.world for stay in rows["rank 2"].stays] == [2]
    assert {mark.kind for mark in rows["rank 0"].marks} == {"failure", "shrink"}


def test_curves_tell_what_was_done_again(tmp_path: Path) -> None:
    story = tell(eventful(tmp_path / "run", {"lr": 0.1, "my Loss": 1.0}), status())
    assert [curve.name for curve in story.curves] == ["my Loss", "lr"]
    points = story.curves[0].points
    assert {point.step for point in points if not point.counts} == {110, 120, 130, 140, 150}
    assert [point.step for point in points if point.counts] == list(range(10, 201, 10))


def test_a_run_that_failed_before_training_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave(
        tmp_path / "run",
        [failure(3, 0, 1, 1, 1, "exit code 1"), event("failed", 3.1, 0, reason="all ranks failed")],
    )
    log = RunDirectory(path).log_file(1)
    log.write_text(f"hello\nTraceback (most recent call last):\n  File x\nValueError: {NASTY}\n")
    RunDirectory(path).log_file(0).write_text("nothing to see\n")
    told = json_of(path, capsys)
    assert told["words"][0] == "The run failed before training began: all ranks failed."
    assert told["traceback"]["world"] == 1
    assert told["traceback"]["text"].endswith(f"ValueError: {NASTY}")
    assert told["goodput"]["steps"] == 0
    assert told["curves"] == told["ranks"] == []
    page = draw(tell(path, status(state="failed", reason="all ranks failed")))
    assert NASTY in Elements(page).text
    assert NASTY not in page


def test_the_traceback_is_of_who_ended_the_run_even_in_a_huge_log(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [
            start(0, 2),
            failure(3, 5, 0, 0, 1, "exit code 1"),
            failure(9, 9, 1, 1, 2, "exit code 1"),
            event("failed", 9.1, 9, reason="it is wrong"),
        ],
    )
    for world in range(2):
        with RunDirectory(path).log_file(world).open("w") as log:
            log.write("step\n" * 1_000_000)
            log.write(f"Traceback (most recent call last):\n  File x\nValueError: {world}\n")
    story = tell(path, status(state="failed"))
    assert story.traceback is not None
    assert (story.traceback.world, story.traceback.text.split()[-1]) == (1, "1")
    # What has failed in a run that ended well ended nothing.
    assert tell(path, status(state="ok")).traceback is None


def test_a_run_that_was_killed_is_told_up_to_its_last_sign(tmp_path: Path) -> None:
    path = leave(tmp_path / "run", [start(10, 1)], steps(0, 1, 100, 10))
    sign = {"time": T0 + 25, "step": 100, "stepped": T0 + 20, "rate": 1.0, "metrics": {}}
    RunDirectory(path).write_status(sign)
    story = tell(path, status(state="killed"))
    assert story.goodput.whole == pytest.approx(25)
    assert story.words[0].startswith("The run on 1 rank was killed from outside at step 100")
    assert "Nobody could write down why it ended" in story.look_at[0]


def test_nothing_there_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = leave(tmp_path / "run", [])
    told = json_of(path, capsys)
    assert "no rank has come to its training yet" in told["words"][0]
    assert main(["report", str(path)]) == 0
    assert Elements((path / "report.html").read_text()).having("data-mark") == []


def test_bad_use_has_a_clear_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    path = eventful(tmp_path / "run", {})
    assert main(["report", str(path), "--output", str(tmp_path / "no" / "where.html")]) == 1
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert "--output" in error
    (path / "summary.json").write_text("")
    assert main(["report", str(path)]) == 1
    assert "cannot be read" in capsys.readouterr().err
    assert not (path / "report.html").exists()


def test_what_others_have_written_is_escaped(tmp_path: Path) -> None:
    path = eventful(tmp_path / NASTY.replace("/", ""), {NASTY: 1.0}, cause=NASTY)
    story = tell(path, status(name=NASTY, reason=NASTY))
    text = draw(story)
    page = Elements(text)
    assert "onerror" not in {name for _, attributes in page.tags for name in attributes}
    assert "img" not in {tag for tag, _ in page.tags}
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert NASTY in page.having("data-name")


def test_a_large_run_makes_no_large_page(tmp_path: Path) -> None:
    ranks, saves, failures = 120, 8000, 800
    path = leave(
        tmp_path / "run",
        [
            start(0, ranks, 100),
            *(event("checkpoint", 1 + n / 10, n, path=f"ck/{n}") for n in range(saves)),
            *(
                failure(1 + n, 10 * n, n % ranks, n % ranks, n, "it is so " * 100)
                for n in range(failures)
            ),
        ],
        *(steps(rank, 1, 100, 0, metrics={f"m{n}": 1 for n in range(40)}) for rank in range(ranks)),
    )
    story = tell(path, status(state="silent", ended=False))
    text = draw(story)
    assert len(text) < 3_000_000
    page = Elements(text)
    assert len(page.having("data-mark")) < 4000
    assert len(page.having("data-rank")) == MOST_ROWS
    assert any("marks of the timeline are counted" in note for note in story.notes)
    assert any("incidents" in note for note in story.notes)
    assert any("40 metrics" in note for note in story.notes)
    assert "more ranks have no box" in page.text
    # None is forgotten: marks that are not drawn are counted in others.
    assert sum(mark.count for mark in story.timeline.run) == saves
    failed = [m.count for row in story.timeline.rows for m in row.marks if m.kind == "failure"]
    assert sum(failed) == failures
    assert len(story.ranks) == ranks


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=3000))
def test_a_thinned_curve_keeps_its_extremes(values: list[float]) -> None:
    readings = [Reading(n, float(n), {"x": value}, True) for n, value in enumerate(values)]
    finite = [value for value in values if abs(value) < float("inf")]
    found = curves(readings)
    if not finite:
        assert found == []
        return
    (curve,) = found
    kept = [point.value for point in curve.points]
    assert (min(kept), max(kept)) == (min(finite), max(finite))
    assert len(kept) <= 600
    assert curve.known == len(finite)
    assert [point.step for point in curve.points] == sorted({point.step for point in curve.points})


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_on_the_axis(first: float, length: float) -> None:
    ticks = nice(first, first + length)
    assert len(ticks) <= 12
    assert all(first - 1e-3 * length <= tick <= first + length * (1 + 1e-3) for tick in ticks)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (-1.0, "0 s"),
        (0.0, "0 s"),
        (3.2e-5, "32 µs"),
        (0.0123, "12.3 ms"),
        (0.25, "250 ms"),
        (42.0, "42 s"),
        (3725.0, "62 min 5 s"),
        (7500.0, "2 h 5 min"),
        (200000.0, "2 d 7 h"),
    ],
)
def test_durations(seconds: float, says: str) -> None:
    assert duration(seconds) == says


def test_amounts() -> None:
    assert short(1234.5) == "1234 s"
    assert [percent(p) for p in (0, 0.0001, 0.034, 0.5, 0.999, 1)] == [
        *("0 %", "< 0.1 %", "3.4 %", "50 %", "99.9 %", "100 %")
    ]


def test_what_was_done_about_a_failure() -> None:
    events = (
        start(0, 2),
        failure(5, 50, 1, 1, 1),
        event("save failed", 6, 50, why="the disk is full"),
        event("relaunch", 7, 80, reason="too few ranks are left"),
        start(8, 2),
        event("restore", 8.5, 40, path="ck/40"),
    )
    told = incidents([Chapter(Path(), T0, T0 + 9, events)])
    assert [(one.kind, one.then, one.lost_steps) for one in told] == [
        ("failure", "all ranks were started again", None),
        ("checkpoint", "a checkpoint could not be saved", None),
        ("relaunch", "all ranks were started again, from step 40", 40),
    ]


def test_what_to_look_at(tmp_path: Path) -> None:
    path = leave(
        tmp_path / "run",
        [
            start(0, 1),
            event("checkpoint", 5, 50, path="ck/50"),
            event("save failed", 8, 70, why="no space left"),
            event("interrupted", 40, 100, reason="SIGTERM", newest=50),
        ],
        steps(0, 1, 100, 0, compute=0.1, saving=0.3),
    )
    story: Story = tell(path, status(state="interrupted", reason="SIGTERM"))
    said = "\n".join(story.look_at)
    assert "The newest checkpoint is of step 50" in said
    assert "save less often" in said
    assert "no space left" in said
    assert "was asked to end and left at step 100" in story.words[0]
