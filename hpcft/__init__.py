"""hpcft: PyTorch training that survives the loss of ranks and nodes in place.

Importing this package is cheap on purpose: it starts neither MPI nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["ElasticBatchSampler", "Job", "State", "init"]

if TYPE_CHECKING:
    from hpcft.train.api import init
    from hpcft.train.job import Job
    from hpcft.train.sampler import ElasticBatchSampler
    from hpcft.train.state import State

_HOME = {
    "ElasticBatchSampler": "hpcft.train.sampler",
    "Job": "hpcft.train.job",
    "State": "hpcft.train.state",
    "init": "hpcft.train.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'hpcft' has no attribute {name!r}")
