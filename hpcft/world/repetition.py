"""Telling a script that is wrong from ranks that fail."""

from __future__ import annotations

from hpcft.errors import HpcftError
from hpcft.world.recovery import Recovered, World

#: Seconds rank 0 waits to be told of a failure.
_PATIENCE = 0.5


class Repetition:
    """Notices failures that would come again and again, however often they are healed."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._raised: dict[int, tuple[int, str]] = {}

    def look(self, recovery: Recovered) -> None:
        """See whether what has just been healed is worth healing.

        Raises
        ------
        HpcftError: the same rank, whoever played it, has raised the same at the same step; or the
            script has been broken off though nobody failed.
        """
        link = self._world.link
        assert link is not None
        healing, plan = recovery.healing, recovery.transfer
        if plan.anew and not healing.dead:
            raise HpcftError(
                "collectives of the script fail, though no rank has",
                "see that all ranks make the same calls, with tensors of the same sizes",
            )
        step = plan.newest if plan.anew else plan.step
        for logical in healing.failed:
            # MPI can have told of it before the shepherd's message has been read.
            patience = _PATIENCE if self._world.logical == 0 else 0.0
            failure = link.failure(healing.before.active[logical], patience)
            if failure and failure.cause.startswith("exit code"):
                here = (step, failure.cause)
                if self._raised.get(logical) == here:
                    raise HpcftError(
                        f"rank {logical} failed twice at step {step} in the same way: {here[1]}",
                        f"see the log of process {failure.rank} in the run directory",
                    )
                self._raised[logical] = here
