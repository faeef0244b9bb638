"""Having the ranks' checkpoints written beside a parked spare (``--spares-do drain``).

One spare of all does so (:meth:`hpcft.launch.fleet.Fleet.drainer`). What it is to write the ranks'
shepherds bring to its node (:mod:`hpcft.launch.copies`); what it has written rank 0 commits. The
process itself is :mod:`hpcft.train.drainer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.ckpt.near import NearStore
from hpcft.launch.bystander import Bystander
from hpcft.launch.channel import Message
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet
from hpcft.launch.warm import Warm

_RUNS = ("-m", "hpcft.train.drainer")


class Drainer:
    """Started and dropped as the spare is parked and needed, any number of times.

    Parameters
    ----------
    gathered: where what it is to write comes to lie.
    failed: told which checkpoint could not be written, and why; empty: none can be any more.
    """

    def __init__(
        self,
        warm: Warm,
        fleet: Fleet,
        crew: Crew,
        gathered: NearStore,
        failed: Callable[[str, str], None],
    ) -> None:
        self._fleet = fleet
        self._crew = crew
        self._gathered = gathered
        self._failed = failed
        self._process = Bystander(warm, self._heard, self._ended)
        #: Whether something may have been brought here.
        self._chosen = False

    def consider(self, environ: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """Have checkpoints be written, unless they are, if that is this spare's to do."""
        drainer = self._fleet.drainer(self._crew.active)
        if drainer and drainer.rank == self._fleet.rank:
            self._chosen = True
            told = {**options, "gathered": str(self._gathered.path)}
            self._process.start(environ, told, len(self._crew.active), _RUNS)
        else:
            self._process.drop()
            if self._chosen and not (drainer and drainer.rank in self._fleet.here()):
                # It takes memory, which the node's ranks may need.
                Errand(self._gathered.clear_all)
            self._chosen = False

    def drop(self) -> None:
        """Have that end at once."""
        self._process.drop()

    def _heard(self, message: Message) -> None:
        if message["kind"] == "drained":
            self._fleet.note(self._crew.first, **message, world=self._fleet.rank)
        elif message["kind"] == "undrained":
            self._failed(message["checkpoint"], message["why"])

    def _ended(self, why: str) -> None:
        # Nobody else would do so before the next is started.
        Errand(self._gathered.clear_all)
        self._failed("", why)
