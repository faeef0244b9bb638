"""Which runs there are, and whether they still run.

A run says once where it is (:mod:`hpcft.telemetry.registry`). That it has ended follows from its
summary; that it was killed, from its launcher's process, if that was on this host, or from Slurm;
and where neither can be asked, from the silence of its ``status.json``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import UsageError
from hpcft.slurm import queue as slurm
from hpcft.telemetry import registry
from hpcft.telemetry.registry import Entry
from hpcft.telemetry.rundir import RunDirectory

#: Seconds of silence after which nobody is taken to write ``status.json`` any more.
SILENCE = 30.0
#: Seconds a run's directory may take to be read.
PATIENCE = 5.0


@dataclass(frozen=True)
class Run:
    """A run: its directory, and what it has said of itself when it started, if that is known."""

    rundir: RunDirectory
    entry: Entry | None

    @property
    def name(self) -> str:
        """What people call it."""
        return self.entry.name if self.entry else self.rundir.path.name

    def alive(self, jobs: Jobs) -> bool | None:
        """Whether it runs, or waits in Slurm's queue to go on; None if nobody can tell."""
        entry = self.entry
        if entry is None:
            return None
        if entry.step:
            return jobs.step_runs(entry)
        if entry.here:
            return entry.alive
        if entry.job and jobs.state(entry) == "":
            return False
        return None


class Jobs:
    """What Slurm says of the jobs that some runs are in; it is asked once for all of them."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._wanted = [run.entry.job for run in runs if run.entry and run.entry.job]
        self._states: dict[str, str] | None = None
        self._asked = False

    def state(self, entry: Entry) -> str | None:
        """Of the job a run is in; empty if the job has ended, None if Slurm does not say."""
        if not self._asked:
            self._asked = True
            self._states = slurm.states(self._wanted)
        return None if self._states is None else self._states.get(entry.job, "")

    def step_runs(self, entry: Entry) -> bool | None:
        """Whether a run's step does, or will again."""
        state = self.state(entry)
        if not state:
            return None if state is None else False
        return True if state == "PENDING" else slurm.step_runs(entry.job, entry.step)


def known() -> list[Run]:
    """All runs of this user that are remembered, the oldest first."""
    return [Run(RunDirectory(Path(entry.run_dir)), entry) for entry in registry.entries()]


def find(name: str) -> Run:
    """The run that ``name`` means: its directory, its name, or the number of its Slurm job.

    Of several the one that was started last is meant.

    Raises
    ------
    UsageError: there is none.
    """
    path = Path(name).absolute()
    runs = known()
    if path.is_dir():
        entries = [run for run in runs if run.rundir.path.resolve() == path.resolve()]
        if not entries and not _is_run_directory(path):
            raise UsageError(
                f"{name} is not the directory of a run",
                "name one such as hpcft-runs/..., or a run as `hpcft ps --all` shows it",
            )
        return entries[-1] if entries else Run(RunDirectory(path), None)
    found = [run for run in runs if run.entry and name in (run.name, run.entry.job)]
    if not found:
        names = ", ".join(run.name for run in runs[-5:]) or "none"
        raise UsageError(
            f"there is no run {name!r}", f"give its directory; the last ones known are: {names}"
        )
    return found[-1]


def _is_run_directory(path: Path) -> bool:
    rundir = RunDirectory(path)
    files = (rundir.events_file, rundir.ranks_file, rundir.summary_file, path / "logs")
    return any(file.exists() for file in files)
