"""The run directory: where a run leaves what people and later runs need.

::

    ranks.json     logical rank -> world rank, host, pid, role; kept current through failures
    events.jsonl   one line an event
    status.json    how far it is, renewed every second
    summary.json   written at the end
    metrics.json   where its metrics are served, as long as they are (--metrics-port)
    door.json      how to join it, as long as it trains; its user alone can read that
    report.html    written by `hpcft report`, if somebody has asked for it
    laps/          how the ranks spend their steps, rank-<world rank>.jsonl (hpcft.telemetry.laps)
    tensorboard/   what TensorBoard shows of it (--tensorboard)
    chaos/         what `hpcft chaos` has still to undo
    logs/          stdout and stderr of every process, rank-<world rank>.log
    roll-*         only while ranks start on several nodes: how these find each other; private
    called-off-*   only where ranks did not start: the launch it names has failed
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcft.telemetry import events as log
from hpcft.telemetry.events import Event
from hpcft.telemetry.folder import make_folder

#: Bytes from the end of a log in which a traceback is looked for; logs may be huge.
_LOG_END = 1 << 20


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run under ``path``.

    tell: called with each event that is added here; None for nobody.
    """

    path: Path
    tell: Callable[[Event], None] | None = field(default=None, compare=False)

    @property
    def ranks_file(self) -> Path:
        return self.path / "ranks.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def status_file(self) -> Path:
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.json"

    @property
    def door_file(self) -> Path:
        return self.path / "door.json"

    @property
    def report_file(self) -> Path:
        return self.path / "report.html"

    @property
    def _replaced_files(self) -> tuple[Path, ...]:
        """Those that are replaced as a whole while the run goes on."""
        of_ranks = (self.ranks_file, self.status_file, self.summary_file)
        return (*of_ranks, self.metrics_file, self.door_file)

    def _called_off_file(self, launch: str) -> Path:
        return self.path / f"called-off-{launch}"

    def _roll_file(self, launch: str) -> Path:
        return self.path / f"roll-{launch}.json"

    def log_file(self, world: int) -> Path:
        """Where process ``world``'s output goes."""
        return self.path / "logs" / f"rank-{world}.log"

    @property
    def tensorboard_folder(self) -> Path:
        return self.path / "tensorboard"

    @property
    def laps_folder(self) -> Path:
        return self.path / "laps"

    def create(self, size: int, launch: str) -> None:
        """Make the directory, and clear what a former run left under the names above.

        Parameters
        ----------
        size: number of processes; their logs are left alone, for they may have begun them.
        launch: what this launch is called; it may have failed already.

        Raises
        ------
        OSError: it cannot be made or written to.
        """
        make_folder(self.path / "logs")
        make_folder(self.laps_folder)
        own = {self.log_file(world) for world in range(size)}
        former = set((self.path / "logs").glob("rank-*.log")) - own
        former |= set(self.laps_folder.glob("rank-*.jsonl"))
        former |= set(self.tensorboard_folder.glob("events.*"))
        former |= set(self.tensorboard_folder.glob("validation/events.*"))
        former |= set(self.path.glob("called-off-*")) - {self._called_off_file(launch)}
        former |= set(self.path.glob("*roll-*.json*")) - {self._roll_file(launch)}
        for file in (self.events_file, self.report_file, *self._replaced_files, *former):
            file.unlink(missing_ok=True)
        self._sweep()

    def events(self) -> list[Event]:
        """All events so far."""
        return list(log.read(self.events_file))

    def launch_events(self) -> list[Event]:
        """Those of the present launch of the ranks."""
        return self._by_launch()[1]

    def former_events(self) -> list[Event]:
        """Those of the launches before."""
        return self._by_launch()[0]

    def _by_launch(self) -> tuple[list[Event], list[Event]]:
        events = self.events()
        last = max((i for i, e in enumerate(events) if e.kind in log.ANEW), default=-1)
        return events[: last + 1], events[last + 1 :]

    def append(self, events: list[Event]) -> None:
        """Add events to the log."""
        log.append(self.events_file, events)
        for event in events if self.tell else ():
            assert self.tell is not None
            self.tell(event)

    def ranks(self) -> list[dict[str, Any]]:
        """The entries of ``ranks.json``; none if there is none yet."""
        table = _content(self.ranks_file)
        entries: list[dict[str, Any]] = table["ranks"] if table else []
        return entries

    def status(self) -> dict[str, Any] | None:
        """What ``status.json`` says; None if it is not there yet."""
        return _content(self.status_file)

    def summary(self) -> dict[str, Any] | None:
        """What ``summary.json`` says; None before the run's end."""
        return _content(self.summary_file)

    def door(self) -> dict[str, Any] | None:
        """What ``door.json`` says; None if it is not there."""
        return _content(self.door_file)

    def roll(self, launch: str) -> dict[str, Any] | None:
        """Where the nodes of ``launch`` are to say that they are there; None if nowhere yet."""
        return _content(self._roll_file(launch))

    def metrics_url(self) -> str | None:
        """Where the run's metrics are served; None if they are not."""
        content = _content(self.metrics_file)
        return None if content is None else str(content["url"])

    def failed(self) -> bool:
        """Whether there is a summary, and of a run that has failed."""
        summary = self.summary()
        return summary is not None and summary["result"] == "failed"

    def call_off(self, launch: str) -> bool:
        """Have no task begin that comes late to ``launch``, which has failed.

        Returns
        -------
        Whether this is the first task to say so. Where nothing can be written, on a full disk, all
        are the first, and those that come late give up after minutes.
        """
        try:
            self._called_off_file(launch).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:
            pass
        return True

    def called_off(self, launch: str) -> bool:
        """Whether ``launch`` has failed already."""
        return self._called_off_file(launch).exists()

    def last_traceback(self, world: int) -> str:
        """The last that process ``world`` has left in its log; empty if there is none."""
        try:
            with self.log_file(world).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - _LOG_END))
                log = file.read().decode(errors="replace")
        except OSError:
            return ""
        found = re.findall(r"^Traceback \(most recent.*\n(?:[ \t].*\n)*.*", log, re.MULTILINE)
        return found[-1] if found else ""

    def write_ranks(self, table: dict[str, Any]) -> None:
        """Replace ``ranks.json``."""
        _replace(self.ranks_file, table)

    def write_status(self, status: dict[str, Any]) -> None:
        """Replace ``status.json``."""
        _replace(self.status_file, status)

    def write_door(self, door: dict[str, Any]) -> None:
        """Replace ``door.json``."""
        _replace(self.door_file, door, 0o600)

    def write_roll(self, launch: str, where: dict[str, Any]) -> None:
        """Say where the nodes of ``launch`` are to say that they are there."""
        _replace(self._roll_file(launch), where, 0o600)

    def clear_roll(self, launch: str) -> None:
        """They need not any more."""
        self._roll_file(launch).unlink(missing_ok=True)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace ``summary.json``, the last thing a run does."""
        _replace(self.summary_file, summary)
        self.door_file.unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what writers left that were killed in the middle of it."""
        for file in self._replaced_files:
            for torn in self.path.glob(f".{file.name}.*"):
                torn.unlink(missing_ok=True)


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content


def _replace(path: Path, content: dict[str, Any], mode: int = 0o666) -> None:
    # A reader sees the old file or the new one, never half of one.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(aside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode), "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
