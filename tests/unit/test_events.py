"""What the log of events says of the ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hpcft.telemetry import events as log
from hpcft.telemetry.beginnings import size_at
from hpcft.telemetry.events import Echo, Event, line
from hpcft.telemetry.rundir import RunDirectory


def start(active: int) -> Event:
    return Event("start", 0, detail={"active": active})


def resume(step: int, active: int) -> Event:
    return Event("resume", step, detail={"active": active})


def at(kind: str, step: int) -> Event:
    return Event(kind, step)


FIRST = [start(4), at("checkpoint", 5), resume(8, 3), at("checkpoint", 10)]
SECOND = [at("relaunch", 12), start(2), at("damaged", 10), at("restore", 5), at("checkpoint", 10)]


@pytest.mark.parametrize(
    ("events", "step", "size"),
    [
        ([], 5, None),
        ([start(4)], 0, None),
        (FIRST, 5, 4),
        (FIRST, 8, 4),
        (FIRST, 9, 3),
        # The first launch's step 10 was no good: what is there is the second's.
        ([*FIRST, *SECOND], 10, 2),
        ([*FIRST, *SECOND], 5, 4),
        ([*FIRST, *SECOND, at("restore", 10), resume(10, 1)], 10, 2),
        ([*FIRST, *SECOND, at("restore", 10), resume(10, 1)], 15, 1),
    ],
)
def test_how_many_ranks_made_a_step(events: list[Event], step: int, size: int | None) -> None:
    assert size_at(events, step) == size


def test_an_event_is_a_line() -> None:
    detail = {"cause": "killed", "phases": {"a": 1.5, "b": None}, "hosts": ["n1", "n2"], "left": []}
    text = line(Event("failure", 7, (1, 2), 0, 0.0, detail))
    assert re.fullmatch(
        r"hpcft: \d\d:\d\d:\d\d failure, step 7, ranks 1 2, cause killed, "
        r"phases \(a 1.5, b none\), hosts n1 n2, left none",
        text,
    )


def test_what_is_added_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added = [Event("start", 0, (0,)), Event("finish", 3)]
    RunDirectory(tmp_path, Echo(terminal=False)).append(added)
    assert capsys.readouterr().err == "".join(f"{line(event)}\n" for event in added)
    RunDirectory(tmp_path).append(added)
    assert capsys.readouterr().err == ""
    assert RunDirectory(tmp_path).events() == added + added


_KINDS = st.lists(
    st.sampled_from(("start", "checkpoint", "failure", "finish")), min_size=1, max_size=8
)


@given(_KINDS, st.integers(0, 60))
@example(["start", "checkpoint"], 1)
@example(["start", "finish", "checkpoint"], 2)
def test_a_skimmed_log_has_its_ends_and_one_kind(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], torn: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    log.append(path, [Event(kind, n, (n,), time=float(n)) for n, kind in enumerate(kinds)])
    path.write_bytes(path.read_bytes()[: -torn or None])
    whole = list(log.read(path))
    expected = [e for e in whole if e.kind == "failure" or e in (whole[0], whole[-1])]
    assert log.skim(path, "failure") == expected
