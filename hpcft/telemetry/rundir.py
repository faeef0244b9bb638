"""The run directory: where a run leaves what people and later runs need.

::

    ranks.json     logical rank -> world rank, host, pid, role; kept current through failures
    events.jsonl   one line an event
    summary.json   written at the end
    logs/          stdout and stderr of every process, rank-<world rank>.log
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.telemetry import events as log
from hpcft.telemetry.events import Event


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run under ``path``."""

    path: Path

    @property
    def ranks_file(self) -> Path:
        return self.path / "ranks.json"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    def log_file(self, world: int) -> Path:
        """Where process ``world``'s output goes."""
        return self.path / "logs" / f"rank-{world}.log"

    def create(self, size: int) -> None:
        """Make the directory, and clear what a former run left under the names above.

        Parameters
        ----------
        size: number of processes; their logs are left alone, for they may have begun them.

        Raises
        ------
        OSError: it cannot be made or written to.
        """
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        own = {self.log_file(world) for world in range(size)}
        former = set((self.path / "logs").glob("rank-*.log")) - own
        for file in (self.ranks_file, self.events_file, self.summary_file, *former):
            file.unlink(missing_ok=True)
        self._sweep()

    def events(self) -> list[Event]:
        """All events so far."""
        return list(log.read(self.events_file))

    def append(self, events: list[Event]) -> None:
        """Add events to the log."""
        log.append(self.events_file, events)

    def ranks(self) -> list[dict[str, Any]]:
        """The entries of ``ranks.json``; none if there is none yet."""
        try:
            entries: list[dict[str, Any]] = json.loads(self.ranks_file.read_text())["ranks"]
        except FileNotFoundError:
            return []
        return entries

    def failed(self) -> bool:
        """Whether there is a summary, and of a run that has failed."""
        try:
            return bool(json.loads(self.summary_file.read_text())["result"] == "failed")
        except FileNotFoundError:
            return False

    def write_ranks(self, table: dict[str, Any]) -> None:
        """Replace ``ranks.json``."""
        _replace(self.ranks_file, table)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace ``summary.json``, the last thing a run does."""
        _replace(self.summary_file, summary)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what writers left that were killed in the middle of it."""
        for file in (self.ranks_file, self.summary_file):
            for torn in self.path.glob(f".{file.name}.*"):
                torn.unlink(missing_ok=True)


def _replace(path: Path, content: dict[str, Any]) -> None:
    # A reader sees the old file or the new one, never half of one.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(path)
