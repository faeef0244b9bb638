"""Sharing the batch out by speed while a job trains (``--balance``).

Now and then, at the end of the same step, all ranks compare how long they compute for a sample. If
steps would be shorter for it, the shares are changed: from the first batch on that no rank has read
ahead. A change counts from the next commit on, as part of the state: a rank that completes that
step knows that all have come past this one, so that in a failure either nobody has it or whoever
gives the others its state.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from statistics import median

from mpi4py import MPI

from hpcft.train.comm_ranks import CommRanks
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.shares import Place, Speed, Weights, better

#: Steps between two looks at the least.
_STEPS = 20
#: Seconds between two looks, at first and at most; doubled each time that nothing is changed.
_FIRST, _LONGEST = 2.0, 60.0


@dataclass(frozen=True)
class Decision:
    """What rank 0 has found, for all.

    weights: the new ones; None if the shares stay.
    since: the first batch that they are for.
    next: the step at whose end all look again.
    """

    weights: Weights | None
    since: Place
    next: int


class Balance:
    """Of one rank; all do the same at the same steps.

    Parameters
    ----------
    sampler: shares the batches out.
    """

    def __init__(self, sampler: ElasticBatchSampler) -> None:
        self._sampler = sampler
        self._ranks: CommRanks | None = None

    def begin(self, comm: MPI.Intracomm, step: int) -> None:
        """These ranks train from now on, which have completed ``step``."""
        self._ranks = CommRanks(comm)
        self._next = step + _STEPS
        self._pause = _FIRST
        self._clear(step)

    def _clear(self, step: int) -> None:
        self._times: dict[int, list[float]] = {}
        self._since = (step, time.monotonic())

    def edge(self, step: int, samples: int, seconds: float) -> Weights | None:
        """A step is completed, in all ranks.

        Parameters
        ----------
        samples: how many this rank had.
        seconds: what it has computed.

        Returns
        -------
        The weights, if the batch is shared out anew.

        Raises
        ------
        MPI.Exception: a rank has failed.
        """
        self._times.setdefault(samples, []).append(seconds)
        if step < self._next:
            return None
        assert self._ranks is not None
        # The tail of an epoch, and the time before a change came into force, are of other shares.
        usual = Counter({count: len(times) for count, times in self._times.items()})
        count = usual.most_common(1)[0][0]
        mine = Speed(median(self._times[count]), count, self._sampler.read)
        speeds = self._ranks.gather(mine)
        decision: Decision = self._ranks.share(self._decide(step, speeds) if speeds else None)
        if decision.weights is not None:
            self._sampler.share_out(decision.weights, decision.since)
        self._next = decision.next
        self._clear(step)
        return decision.weights

    def _decide(self, step: int, speeds: list[Speed]) -> Decision:
        weights = better(speeds)
        self._pause = _FIRST if weights else min(2 * self._pause, _LONGEST)
        first, began = self._since
        of_a_step = (time.monotonic() - began) / max(1, step - first)
        steps = max(_STEPS, math.ceil(self._pause / max(of_a_step, 1e-9)))
        return Decision(weights, max(one.read for one in speeds), step + steps)
