"""The way into hpcft for a training script."""

from __future__ import annotations

from hpcft.train.job import Job, OnShrink
from hpcft.world.session import current

_job: Job | None = None


def init(*, seed: int = 0, on_shrink: OnShrink = "keep-lr") -> Job:
    """Join the world and set up torch.distributed over it (backend ``hpcft``).

    To be called once, before models are wrapped. Under ``python -m hpcft.run`` the job survives
    failures; under a bare mpiexec, or alone, it trains all the same, and does not.

    Parameters
    ----------
    seed: what all random numbers of the training follow from.
    on_shrink: what changes when the job goes on with fewer ranks: ``"keep-lr"`` nothing, so that
        the global batch is smaller; ``"scale-lr"`` the learning rate, in proportion to the global
        batch (Goyal et al., "Accurate, large minibatch SGD", 2017); ``"keep-global-batch"`` the
        ranks' own batches, which grow so that the global batch stays.

    Returns
    -------
    The job; the same one if called again.
    """
    global _job
    if _job is None:
        _job = Job(current(), seed, on_shrink)
    return _job
