"""The way into hpcft for a training script."""

from __future__ import annotations

from hpcft.train import afresh, cooled
from hpcft.train.dealing import OnShrink
from hpcft.train.evaluation import Evaluation
from hpcft.train.job import Job
from hpcft.train.lasting import Lasting
from hpcft.world.bystander import present
from hpcft.world.script import on_interruption
from hpcft.world.session import current

_lasting: Lasting | None = None
_job: Job | Evaluation | None = None


def init(*, seed: int = 0, on_shrink: OnShrink = "keep-lr") -> Job | Evaluation:
    """Join the world and set up torch.distributed over it (backend ``hpcft``).

    To be called by the script, before models are wrapped; again each time the script is run anew.
    Under ``python -m hpcft.run`` the job survives
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
    global _lasting, _job
    if _job is None and (bystander := present()):
        _job = Evaluation(bystander, seed)
    if _job is None:
        _lasting = _lasting or Lasting(current())
        _job = Job(_lasting, seed, on_shrink)
        on_interruption(_reset)
    return _job


def _reset() -> None:
    """The script has been unwound, to be run anew."""
    global _job
    assert isinstance(_job, Job)
    job, _job = _job, None
    job.leave()
    bare = job.bare
    # It holds what the script had made.
    del job
    afresh.forget()
    if bare:
        assert _lasting is not None
        cooled.stand_by(_lasting)
