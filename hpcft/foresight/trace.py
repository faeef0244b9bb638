"""The failures that a run has had, to be played through again under another setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.report.record import Chapter


@dataclass(frozen=True)
class Strike:
    """A failure.

    at: when; seconds after the run's begin.
    nodes: how many it has taken; 0: all ranks had to be started again, and none is to blame.
    spare: whether they have waited, and not trained.
    """

    at: float
    nodes: int
    spare: bool = False


def strikes(chapters: Sequence[Chapter], ranks_per_node: int) -> tuple[Strike, ...]:
    """Of a run, in order of time.

    Processes of a host that failed together are a failure of as many nodes as they fill.
    """
    begin = next((chapter.begun for chapter in chapters if chapter.begun is not None), 0.0)
    #: By launch, epoch, host and role: when first, and how many processes.
    together: dict[tuple[int, int, str, bool], tuple[float, int]] = {}
    found: list[Strike] = []
    launch = 0
    for chapter in chapters:
        launch += 1
        open_ = False
        for event in chapter.events:
            if event.kind == "failure":
                spare = event.detail.get("role") == "spare"
                open_ = open_ or not spare
                key = launch, event.epoch, str(event.detail.get("host")), spare
                at, processes = together.get(key, (event.time, 0))
                together[key] = min(at, event.time), processes + 1
            elif event.kind in ("resume", "resize"):
                open_ = False
            elif event.kind == "relaunch":
                if not open_:
                    found.append(Strike(event.time - begin, 0))
                launch, open_ = launch + 1, False
    for (_, _, _, spare), (at, processes) in together.items():
        found.append(Strike(at - begin, -(-processes // ranks_per_node), spare))
    return tuple(sorted(found, key=lambda strike: strike.at))
