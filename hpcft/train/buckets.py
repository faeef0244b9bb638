"""The buckets of DistributedDataParallel, which all ranks must have alike.

DDP gathers gradients in buckets, first in the order in which the parameters were registered, and
makes them anew in the order in which gradients came when a second forward pass begins; that is a
collective. A process that has made its buckets anew and one that has not cannot add up gradients
with each other: so spares do it while they are parked, and survivors before they take in a spare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch.nn.parallel import DistributedDataParallel


class Buckets:
    """The buckets of the DDP modules among ``modules``."""

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        # DDP leaves the buckets as they are if any parameter may go without a gradient.
        self._unsettled = [
            module
            for module in modules
            if isinstance(module, DistributedDataParallel)
            and (module.static_graph or not module.find_unused_parameters)
        ]

    @property
    def settled(self) -> bool:
        """Whether all are as they will stay."""
        return not self._unsettled

    def settle(self) -> None:
        """Make anew those that can be: their module's first backward pass is done. A collective."""
        for module in list(self._unsettled):
            # DDP says by an exception that a backward pass is still to come.
            with contextlib.suppress(RuntimeError):
                if module._has_rebuilt_buckets or module.reducer._rebuild_buckets():
                    module._has_rebuilt_buckets = True
                    self._unsettled.remove(module)
