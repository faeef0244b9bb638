"""How gradients are averaged: a communication hook for DistributedDataParallel.

DDP reads the hook's annotations, so they must not be strings.
"""

from typing import Protocol

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from hpcft.train.process_group import WorldProcessGroup, completed


class Averaging(Protocol):
    """What the hook needs.

    group: the ranks.
    scale: what this rank's gradients are multiplied with before they are added up; 1/size where
        all ranks have batches of one size, else the rank's share of the samples.
    own_gradients: whether a rank steps on its own gradients, so that they are left as they are.
    """

    group: WorldProcessGroup
    scale: float
    own_gradients: bool


def averaging_hook(averaging: Averaging, bucket: GradBucket) -> Future[torch.Tensor]:
    """Average one bucket of gradients, in place.

    DDP's own way divides by the number of ranks there were when the module was wrapped.
    """
    gradients = bucket.buffer()
    if averaging.group.failure is None and not averaging.own_gradients:
        if averaging.scale != 1:
            gradients.mul_(averaging.scale)
        averaging.group.allreduce([gradients])
    return completed(gradients)
