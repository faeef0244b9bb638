"""Having checkpoints evaluated beside a parked spare (``--spares-do evaluate``).

The process runs the script up to ``job.run``; from there on :mod:`hpcft.train.evaluation` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpcft.ckpt.errand import Errand
from hpcft.launch.bystander import Bystander
from hpcft.launch.channel import Message
from hpcft.launch.chronicle import Chronicle
from hpcft.launch.crew import Crew
from hpcft.launch.warm import Warm


class Evaluator:
    """Started and dropped as the spare is parked and needed, any number of times.

    Parameters
    ----------
    rank: the spare's.
    """

    def __init__(self, warm: Warm, rank: int, crew: Crew, chronicle: Chronicle) -> None:
        self._rank = rank
        self._crew = crew
        self._chronicle = chronicle
        self._process = Bystander(warm, self._heard, lambda why: self._failed(-1, why))

    def start(self, environ: Mapping[str, str], options: Mapping[str, Any]) -> None:
        """Have checkpoints be evaluated, unless they are; as :meth:`Bystander.start`."""
        self._process.start(environ, options, len(self._crew.active))

    def drop(self) -> None:
        """Have that end at once."""
        self._process.drop()

    def _heard(self, message: Message) -> None:
        step = message["step"]
        if message["kind"] == "unevaluated":
            self._failed(step, message["why"])
            return
        epoch, metrics, seconds = self._crew.epoch, message["metrics"], message["seconds"]
        # In a thread: a file system that hangs must not keep the shepherd from its beats.
        Errand(lambda: self._chronicle.evaluated(step, epoch, self._rank, metrics, seconds))

    def _failed(self, step: int, why: str) -> None:
        epoch = self._crew.epoch
        Errand(lambda: self._chronicle.unevaluated(step, epoch, self._rank, why))
