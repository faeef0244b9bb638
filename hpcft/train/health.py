"""Whether a step can go on."""

from __future__ import annotations

from hpcft.train.process_group import WorldProcessGroup
from hpcft.world.recovery import World


class Health:
    """Of the ranks that make a step together.

    Attributes
    ----------
    apart: whether each rank trains by itself at present, so that no failure hits another's step.
    """

    def __init__(self, group: WorldProcessGroup, world: World) -> None:
        self._group = group
        self._world = world
        self.apart = False

    def failed(self) -> bool:
        """Whether a failure is known here. Cheap; no MPI."""
        if self.apart:
            return False
        if self._group.failure is not None and self._world.link is None:
            raise self._group.failure
        return self._group.failure is not None or self._world.broken()

    def failed_anywhere(self) -> bool:
        """Whether one is known here, or another rank that trains has met one."""
        assert self._world.active is not None
        return self.failed() or self._world.active.Is_revoked()
