"""What a shepherd tells Slurm, and asks it, when its run is in a Slurm job."""

from __future__ import annotations

import asyncio
import sys
from functools import partial

from hpcft.ckpt.errand import Errand
from hpcft.errors import INTERRUPTED, TooFewRanks
from hpcft.launch.fleet import Fleet
from hpcft.slurm import nodes, queue
from hpcft.slurm.job import find_job
from hpcft.slurm.requeue import Budget, conclude, requeue
from hpcft.slurm.step import Step
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise

#: By so much a save may be slower than the one before.
_SAFETY = 1.5
#: Seconds between two looks at whether Slurm wants nodes back.
_DRAIN_LOOK = 30.0
#: Seconds in which the controller has to say how long it leaves a job that is to end.
_ASKING_TIME = 5.0


class Scheduler:
    """Slurm, as far as it has to do with the run.

    Parameters
    ----------
    step: which the shepherd is a task of.
    verbose: whether it is said, too, what becomes of the job.
    """

    def __init__(self, step: Step, rundir: RunDirectory, verbose: bool) -> None:
        self._step = step
        self._rundir = rundir
        self._verbose = verbose
        self._saved = False

    def saved(self, seconds: float) -> None:
        """A checkpoint is committed; after the first, warn if it could not be in the time left."""
        if self._verbose and not self._saved:
            self._saved = True
            # The controller may be slow.
            Errand(partial(_warn_of_short_grace, self._step, seconds))

    async def grace(self) -> float:
        """Seconds from a warning until Slurm may end the job: the least of those there may be."""
        asking = Errand(partial(_least_grace, self._step))
        return asking.result() if await asking.answered(_ASKING_TIME) else 0.0

    def concluded(self, code: int, most: int, lost: frozenset[str]) -> None:
        """The run is over: have the job start again where that helps.

        Parameters
        ----------
        code: the run's exit code.
        most: how often the job may be requeued.
        lost: names of the nodes that the run has lost.
        """
        step, events = self._step, self._rundir.events()
        if code not in (INTERRUPTED, TooFewRanks.exit_code):
            how = f"failed with exit code {code}" if code else "finished"
            conclude(step.job, step.restarts, events, how)
            return
        budget = Budget(step.restarts, most)
        event, said = requeue(step.job, budget, events, lost, step.nodes)
        self._rundir.append([event])
        self._rundir.write_summary(summarise(self._rundir.events()))
        if self._verbose:
            print(said, file=sys.stderr, flush=True)

    def end_deserted(self, lost: frozenset[str]) -> None:
        """End the job if its script was lost with its node: else it lasts until its time limit.

        Parameters
        ----------
        lost: as for :meth:`concluded`.
        """
        job = find_job(self._step.job) if lost else None
        if job and job.batch and job.batch_host in lost and job.state == "RUNNING":
            if self._verbose:
                print(
                    f"hpcft: job {job.number} is ended, for its script was lost with "
                    f"{job.batch_host}",
                    file=sys.stderr,
                    flush=True,
                )
            queue.cancel(job.number)


async def retire_drained(fleet: Fleet, min_ranks: int) -> None:
    """Have the ranks leave nodes that Slurm is to have back when their jobs have ended.

    Looks for ever.

    Parameters
    ----------
    min_ranks: if fewer would be left, nobody leaves.
    """
    while True:
        await asyncio.sleep(_DRAIN_LOOK)
        if not fleet.speaks:
            continue
        standing = fleet.standing()
        hosts = {rank: host for rank, host in fleet.hosts.items() if rank in standing}
        # A controller that does not answer must not keep the shepherd.
        asking = Errand(partial(nodes.draining, set(hosts.values())))
        await asking.answered()
        going = {rank for rank, host in hosts.items() if host in asking.result()}
        if len(standing - going) >= min_ranks:
            for rank in going - fleet.known("retire"):
                fleet.announce("retire", rank, reason=f"{hosts[rank]} is drained")


def _least_grace(step: Step) -> float:
    job = find_job(step.job)
    return min((grace.seconds for grace in job.graces()), default=0.0) if job else 0.0


def _warn_of_short_grace(step: Step, needed: float) -> None:
    job = find_job(step.job)
    for grace in job.graces() if job else ():
        if grace.seconds < _SAFETY * needed:
            print(
                f"hpcft: warning: {grace.what} leaves {grace.seconds:g} s, and this checkpoint "
                f"took {needed:.1f} s; {grace.remedy}",
                file=sys.stderr,
                flush=True,
            )
