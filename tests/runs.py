"""Run directories as runs leave them, for tests that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcft.report.record import Status
from hpcft.telemetry import laps
from hpcft.telemetry.events import Event
from hpcft.telemetry.laps import Lap, bucket
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise

#: When these runs begin; seconds since 1970.
T0 = 1_800_000_000.0


def start(at: float, active: int, spares: int = 0, restarts: int = 0) -> Event:
    detail = {"active": active, "spares": spares, "restarts": restarts}
    return Event("start", 0, tuple(range(active)), 0, T0 + at, detail)


def failure(
    at: float, step: int, rank: int | None, world: int, epoch: int, cause: str = "killed by SIGKILL"
) -> Event:
    detail = {
        "cause": cause,
        "detect_s": 0.01,
        "role": "spare" if rank is None else "active",
        "world": world,
        "host": f"n{world}",
    }
    return Event("failure", step, () if rank is None else (rank,), epoch, T0 + at, detail)


def resume(at: float, step: int, epoch: int, action: str, active: int, spares: int) -> Event:
    detail = {
        "action": action,
        "active": active,
        "spares": spares,
        "recover_s": 0.1,
        "lost_steps": 0,
        "attempts": 1,
        "phases": {},
    }
    return Event("resume", step, tuple(range(active)), epoch, T0 + at, detail)


def event(kind: str, at: float, step: int, *ranks: int, epoch: int = 0, **detail: Any) -> Event:
    return Event(kind, step, ranks, epoch, T0 + at, detail)


def steps(
    rank: int,
    first: int,
    last: int,
    began: float,
    *,
    world: int | None = None,
    epoch: int = 0,
    compute: float = 0.1,
    waiting: float = 0.0,
    saving: float = 0.0,
    metrics: Mapping[str, float] | None = None,
) -> Iterable[Lap]:
    """Laps of ten steps each that follow each other; times are those of a step."""
    step = compute + waiting + saving
    for begin in range(first, last + 1, 10):
        end = min(begin + 9, last)
        count = end - begin + 1
        at = T0 + began + (begin - first) * step
        yield Lap(
            rank if world is None else world,
            rank,
            epoch,
            begin,
            end,
            at,
            at + count * step,
            count * compute,
            count * waiting,
            count * saving,
            {bucket(compute): count},
            {name: value / end for name, value in (metrics or {}).items()},
        )


def leave(path: Path, events: Iterable[Event], *all_laps: Iterable[Lap]) -> Path:
    """Write what a run leaves; with a summary if it has ended."""
    rundir = RunDirectory(path)
    (path / "logs").mkdir(parents=True)
    told = list(events)
    rundir.append(told)
    if told and told[-1].kind in ("finish", "failed", "interrupted"):
        rundir.write_summary(summarise(told))
    for some in all_laps:
        laps.append(rundir.laps_folder, some)
    return path


STATUS = Status("a run", "ok", True, "", 100, T0, T0 + 1000)


def status(**changes: Any) -> Status:
    """What is known beyond a run's files."""
    return replace(STATUS, **changes)


def eventful(path: Path, metrics: Mapping[str, float], cause: str = "killed by SIGKILL") -> Path:
    """A run of 3 ranks and a spare: rank 1 is slow, rank 2 is replaced, all are started again.

    From 10 s on a step takes 0.2 s; step 100 is saved at 30 s, all die at 40 s after step 150, the
    relaunch goes on from step 100 at 45 s and is finished with step 200 at 65 s.
    """
    before = [
        start(9, 3, 1),
        failure(20, 50, 2, 2, 1, cause),
        event("adoption", 20.2, 50, 2, epoch=1, world=3, host="n3"),
        resume(20.2, 50, 1, "substitute", 3, 0),
        event("recovered", 20.4, 51, epoch=1, stall_s=0.4),
        event("checkpoint", 30.2, 100, epoch=1, path="ck/100", seconds=0.1),
        *(failure(40.2, 150, rank, world, 2) for rank, world in enumerate((0, 1, 3))),
        event("relaunch", 40.3, 150, 0, 1, 2, 3, reason="all ranks failed", hosts=["n0"]),
    ]
    after = [
        start(44, 3, 1),
        event("restore", 44.5, 100, path="ck/100"),
        event("checkpoint", 64.9, 200, path="ck/200", seconds=0.1),
        event("finish", 65.5, 200, params_sha256="0"),
    ]
    fast = {"compute": 0.04, "waiting": 0.16}
    slow = {"compute": 0.18, "waiting": 0.02}
    pace = (fast, slow, fast)
    all_laps: list[Iterable[Lap]] = []
    for rank in range(3):
        said = metrics if rank == 0 else {}
        all_laps.append(steps(rank, 1, 50, 10, metrics=said, **pace[rank]))
        world = 3 if rank == 2 else rank
        all_laps.append(
            steps(rank, 51, 150, 20.2, world=world, epoch=1, metrics=said, **pace[rank])
        )
        all_laps.append(steps(rank, 101, 200, 45, metrics=said, **pace[rank]))
    return leave(path, before + after, *all_laps)
