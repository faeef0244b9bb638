"""What is shown of spares that have given their memory back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from runs import event, leave, start, status

from hpcft.cli.ps import _size
from hpcft.cli.top import _state
from hpcft.report.page import draw
from hpcft.report.story import tell
from hpcft.telemetry.events import Event, cold_now
from hpcft.watch.view import Rank, View


def of(kind: str, world: int) -> Event:
    return Event(kind, 5, detail={"world": world})


def test_a_spare_is_cold_until_it_is_warm_adopted_or_dead() -> None:
    cooled = [of("spare cooled", world) for world in (3, 4, 5, 6)]
    assert cold_now(cooled) == {3, 4, 5, 6}
    after = [of("spare warmed", 3), of("adoption", 4), of("failure", 5)]
    assert cold_now([*cooled, *after]) == {6}
    assert cold_now([*cooled, *after, of("spare cooled", 3)]) == {3, 6}


def test_another_launch_begins_with_warm_spares() -> None:
    assert cold_now([of("spare cooled", 3), Event("relaunch", 5)]) == set()


def test_it_is_said_of_the_spare() -> None:
    spare = Rank(None, 3, "n1", 17, "spare", "parked", None, cold=True)
    assert _state(spare) == "parked; cold, for memory is short"
    run = View(
        "run", "", "training", 0, active=3, spares=2, ranks=(spare, replace(spare, cold=False))
    )
    assert _size(run) == "3 + 2 (1 cold)"


def test_a_report_has_it(tmp_path: Path) -> None:
    story = tell(
        leave(
            tmp_path / "run",
            [
                start(0, 3),
                event("spare cooled", 5, 50, world=3, host="n2"),
                event("copies given up", 6, 60, host="n2"),
                event("spare warmed", 8, 80, world=3, host="n2"),
                event("finish", 10, 100),
            ],
        ),
        status(),
    )
    of_memory = [one for one in story.incidents if one.kind == "memory"]
    assert [one.step for one in of_memory] == [50, 60, 80]
    assert [one.who for one in of_memory] == ["spare 3 on n2", "", "spare 3 on n2"]
    assert [mark.kind for mark in story.timeline.run].count("memory") == 3
    assert draw(story).count('data-mark="memory"') == 3
