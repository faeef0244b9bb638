"""Telling what has become of a launch that the ranks themselves cannot tell of: events, summary."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore, step_of
from hpcft.launch.cause import Death
from hpcft.launch.options import at_terminal
from hpcft.telemetry.events import Event, Times
from hpcft.telemetry.events import failure as failure_event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise

#: Of every rank its logical number, None for a spare, and its host, by its number in MPI.
Ranks = Mapping[int, Mapping[str, Any]]


class Chronicle:
    """Of one launch; kept by the shepherd that speaks for all.

    Parameters
    ----------
    verbose: whether it is said as well; that the run has failed is in any case.
    """

    def __init__(self, rundir: RunDirectory, verbose: bool) -> None:
        self._rundir = rundir
        self._verbose = verbose

    def relaunched(
        self,
        reason: str,
        step: int,
        hosts: Mapping[int, str],
        deaths: Sequence[tuple[Death, float]],
        launched: Ranks,
    ) -> None:
        """This launch has failed, and another is to come.

        Parameters
        ----------
        step: the last that any rank had completed.
        hosts: where the shepherds are that are left.
        deaths, launched: as for :meth:`failed`.
        """
        detail = {"reason": reason, "hosts": sorted({*hosts.values()})}
        again = Event("relaunch", step, tuple(range(len(hosts))), detail=detail)
        self._rundir.append([*self._untold(deaths, launched, step), again])

    def note(self, event: Event, text: str) -> None:
        """Something was found out while the ranks train; they and the shepherds wait for no file.

        Parameters
        ----------
        text: the same for people.
        """
        Errand(lambda: self._rundir.append([event]))
        if self._verbose:
            clear = "\r\x1b[K" if at_terminal() else ""
            print(f"{clear}hpcft: {text}", file=sys.stderr, flush=True)

    def resized(self, reason: str, step: int, hosts: Mapping[int, str]) -> None:
        """The ranks have left to be as many as there are ``hosts``."""
        detail = {"reason": reason, "hosts": sorted({*hosts.values()})}
        self._rundir.append([Event("resize", step, tuple(range(len(hosts))), detail=detail)])
        if self._verbose:
            text = f"hpcft: step {step}: {reason}; going on with {len(hosts)} processes"
            print(text, file=sys.stderr, flush=True)

    def failed(
        self,
        reason: str,
        deaths: Sequence[tuple[Death, float]],
        launched: Ranks,
        near: Sequence[NearStore],
    ) -> None:
        """The run has failed; sums up if the run could not.

        Parameters
        ----------
        deaths: the first first, each with when it became known.
        launched: what would be in ranks.json, had training begun.
        near: where on this node there may be something to go on from.
        """
        print(f"hpcft: the run has failed: {reason}", file=sys.stderr, flush=True)
        if self._verbose:
            for store in near:
                if left := sorted(store.files()):
                    print(
                        f"hpcft: checkpoints up to step {step_of(left[-1])} are kept for the next "
                        f"start, on the nodes in {store.path}",
                        file=sys.stderr,
                        flush=True,
                    )
        if self._rundir.summary_file.exists():
            return
        failures = self._untold(deaths, launched, self._last_step())
        failed = Event("failed", self._last_step(), detail={"reason": reason})
        self._rundir.append([*failures, failed])
        self._rundir.write_summary(summarise(self._rundir.events()))

    def interrupted(self, reason: str, newest: int) -> None:
        """The ranks have left to be launched again, and then the run was asked to end.

        Parameters
        ----------
        newest: the step that they have left.
        """
        step = max(self._last_step(), newest)
        detail = {"reason": reason, "newest": newest}
        self._rundir.append([Event("interrupted", step, detail=detail)])
        self._rundir.write_summary(summarise(self._rundir.events()))

    def evaluated(
        self, step: int, epoch: int, world: int, metrics: Mapping[str, float], seconds: float
    ) -> None:
        """A checkpoint was evaluated beside the spare that is process ``world``.

        What cannot be written down, on a full disk, is said at least.
        """
        detail = {"metrics": dict(metrics), "seconds": seconds, "world": world}
        self._note(Event("evaluation", step, (), epoch, detail=detail))
        said = "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        self._say(f"hpcft: evaluated step {step}:{said}  ({seconds:.1f} s, spare {world})")

    def unevaluated(self, step: int, epoch: int, world: int, why: str) -> None:
        """A checkpoint, or with -1 none any more, could be evaluated beside that spare."""
        detail = {"why": why, "world": world}
        self._note(Event("evaluation failed", max(0, step), (), epoch, detail=detail))
        one, none = f"step {step} could not be evaluated", f"spare {world} evaluates no more"
        said = f"{one if step >= 0 else none}: {why}"
        self._say(f"hpcft: {said}; the log of process {world} may tell more")

    def undrained(self, step: int, epoch: int, world: int, why: str) -> None:
        """A checkpoint, or with -1 none any more, could be written by that spare for the ranks."""
        one, none = f"a spare could not write step {step}", f"spare {world} writes no checkpoints"
        said = f"{one if step >= 0 else none}, the ranks do so themselves: {why}"
        detail = {"why": said, "world": world}
        self._note(Event("drain failed", max(0, step), (), epoch, detail=detail))
        self._say(f"hpcft: {said}")

    def _note(self, event: Event) -> None:
        with contextlib.suppress(OSError):
            self._rundir.append([event])

    def _say(self, text: str) -> None:
        if self._verbose:
            print(text, file=sys.stderr, flush=True)

    def _untold(
        self, deaths: Sequence[tuple[Death, float]], launched: Ranks, step: int
    ) -> list[Event]:
        """The failures that nobody has recovered from."""
        events = self._rundir.launch_events()
        told = {event.detail["world"] for event in events if event.kind == "failure"}
        entries: Ranks = {entry["world"]: entry for entry in self._rundir.ranks()} or launched
        epoch = max((event.epoch for event in events), default=0) + 1
        return [
            failure_event(
                step,
                epoch,
                entries[death.rank]["logical"],
                death.rank,
                entries[death.rank]["host"],
                death.cause,
                Times(death.at, known),
            )
            for death, known in deaths
            if death.rank in entries.keys() - told
        ]

    def _last_step(self) -> int:
        return max((event.step for event in self._rundir.events()), default=0)
