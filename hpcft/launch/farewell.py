"""What is said when a launch is over: written down, uploaded, and told to Slurm."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore
from hpcft.errors import INTERRUPTED, TooFewRanks
from hpcft.launch import history
from hpcft.launch.chronicle import Chronicle
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet
from hpcft.launch.options import RunOptions
from hpcft.launch.outcome import Outcome
from hpcft.launch.place import Task
from hpcft.launch.scheduler import Scheduler
from hpcft.launch.upload import Upload
from hpcft.world.departure import RESIZE

#: Seconds in which it can be written down how a run has ended.
_WRITING_TIME = 30.0
#: Seconds of the time that Slurm leaves a run that are not for uploading it.
_REST_TIME = 5.0


class Farewell:
    """Of one launch; the shepherd that speaks for all says it.

    Parameters
    ----------
    task: the shepherd's process.
    crew: who trains.
    scheduler: Slurm, if the run is a step of a job.
    outcome: what the launch comes to.
    near: what this node keeps of checkpoints.

    Attributes
    ----------
    asked_at: when the run was asked to end in order, by a monotonic clock; None if it was not.
    """

    def __init__(
        self,
        options: RunOptions,
        task: Task,
        crew: Crew,
        chronicle: Chronicle,
        scheduler: Scheduler | None,
        outcome: Outcome,
        near: list[NearStore],
    ) -> None:
        self._options = options
        self._task = task
        self._crew = crew
        self._chronicle = chronicle
        self._scheduler = scheduler
        self._outcome = outcome
        self._near = near
        self._upload: Upload | None = None
        self.asked_at: float | None = None

    def relaunched(self, fleet: Fleet, step: int, hosts: dict[int, str]) -> None:
        """Write down that this launch has failed, and another is to come.

        Parameters
        ----------
        hosts: where the shepherds are that are left.
        """
        reason, deaths = self._outcome.why(), self._outcome.deaths()
        self._chronicle.relaunched(reason, step, hosts, deaths, self._as_launched(fleet))

    def resized(self, fleet: Fleet, step: int, hosts: dict[int, str]) -> None:
        """Write down that the ranks have left to be as many as there are ``hosts``, and say so."""
        self._chronicle.resized(fleet.said(RESIZE)[0]["reason"], step, hosts)

    def missed(self, nodes: frozenset[str]) -> None:
        """For all: nodes were lost before training has begun, and the job may do without them."""
        self._chronicle.failed(self._outcome.reason, (), {}, self._near)
        if self._scheduler and self._options.most_requeues is not None:
            self._scheduler.concluded(TooFewRanks.exit_code, self._options.most_requeues, nodes)

    async def ended(
        self, fleet: Fleet, step: int, lost: frozenset[str], handed_over: bool, at_once: bool
    ) -> None:
        """For all: how the run has ended, and whether it is to start again.

        Parameters
        ----------
        step: the last that the rank had completed.
        lost: names of the nodes that the run has lost.
        handed_over: the ranks have left what the next launch is to go on from.
        at_once: somebody has asked for that.
        """
        code, reason = self._outcome.code, self._outcome.why()
        failed = code not in (0, INTERRUPTED)
        launched, deaths = self._as_launched(fleet), self._outcome.deaths()

        def write() -> None:
            if failed:
                self._chronicle.failed(reason, deaths, launched, self._near)
            if code == INTERRUPTED and handed_over:
                self._chronicle.interrupted(self._outcome.wish, step)
            history.add(self._options.rundir)

        writing = Errand(write)
        if await writing.answered(_WRITING_TIME):
            writing.result()
        else:
            # Nobody else would end a process that waits for ever.
            print(
                f"hpcft: {self._options.run_dir} does not answer: how the run has ended is not in "
                "it",
                file=sys.stderr,
                flush=True,
            )
        # Slurm ends a job that it is to start again at once.
        await self.upload(at_once)
        if self._scheduler and not self._task.of_another_job:
            if self._options.most_requeues is not None:
                self._scheduler.concluded(code, self._options.most_requeues, lost)
            self._scheduler.end_deserted(lost)

    async def upload(self, at_once: bool) -> None:
        """What the run leaves, if the user wants that, and nobody else sees to it."""
        options = self._options
        if options.upload is None or self._task.launched_by_us:
            return
        upload = Upload(options.run_dir, options.upload, not options.verbose)
        limit: float | None = None
        if self._scheduler and self.asked_at is not None:
            waited = time.monotonic() - self.asked_at
            limit = await self._scheduler.grace() - waited - _REST_TIME
        if at_once and self.asked_at is not None:
            upload.skip("as the run was ended at once")
        elif limit is not None and limit <= 0:
            upload.skip("for lack of time")
        else:
            self._upload = upload
            await upload.finish(limit)

    def signalled(self, number: int) -> bool:
        """A signal has come; whether it comes too late for anything but the upload."""
        if self._upload is None:
            return False
        # Of Slurm's and of launchers' some come when all others have ended; SIGINT is meant.
        if number == signal.SIGINT:
            self._upload.stop()
        return True

    def _as_launched(self, fleet: Fleet) -> dict[int, dict[str, Any]]:
        """What would be in ranks.json, had training begun."""
        return {
            rank: {"logical": rank if rank in self._crew.active else None, "host": host}
            for rank, host in fleet.hosts.items()
        }
