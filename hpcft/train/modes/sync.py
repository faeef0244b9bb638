"""Steps of all ranks together: ``--mode sync``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from hpcft.train.dealing import Share
from hpcft.train.modes.strategy import Strategy
from hpcft.train.works import completed


class Sync(Strategy):
    """Gradients are averaged over all ranks."""

    #: What this rank's gradients are multiplied with before they are added up.
    _scale = 1.0

    def begin(self, share: Share, together: bool) -> None:
        self._scale = share.part

    def average(self, bucket: GradBucket) -> Future[torch.Tensor]:
        gradients = bucket.buffer()
        if self.group.failure is None:
            if self._scale != 1:
                gradients.mul_(self._scale)
            self.group.allreduce([gradients])
        return completed(gradients)

    def before_update(self) -> None:
        if self.buffers:
            self._share_buffers(lambda flat: self.group.broadcast([flat]).wait())

    def _share_buffers(self, give: Callable[[torch.Tensor], object]) -> None:
        """Have all ranks go on with one's buffers (running means), as part of the step.

        Parameters
        ----------
        give: gives the others that rank's tensor, in place.
        """
        alike: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for buffer in self.buffers:
            alike.setdefault((buffer.dtype, buffer.device), []).append(buffer)
        for buffers in alike.values():
            flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
            give(flat)
            parts = torch.split(flat, [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
