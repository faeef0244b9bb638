"""What a process keeps while its script is run anew."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from hpcft.ckpt.lock import Lock
from hpcft.ckpt.policy import Policy
from hpcft.telemetry.laps import Lap
from hpcft.telemetry.rundir import RunDirectory
from hpcft.train.checkpoints import Checkpoints
from hpcft.train.pace import Pace
from hpcft.train.teller import Teller
from hpcft.world.repetition import Repetition
from hpcft.world.session import Session


class Lasting:
    """Made once a process; handed to every job of it.

    Attributes
    ----------
    session: the world.
    teller: tells the user.
    pace: writes down where this process's time goes.
    repetition: notices failures that are no good healing.
    checkpoints: saves and restores; None if the user wants none.
    """

    checkpoints: Checkpoints | None

    def __init__(self, session: Session) -> None:
        self.session = session
        self.teller = Teller(session)
        run_dir = session.options.get("run_dir")
        laps = RunDirectory(Path(run_dir)).laps_folder if run_dir else None
        self.pace = Pace(laps, session.world, self._lapped)
        self.repetition = Repetition(session.world)
        world, self.checkpoints = session.world, None
        if wanted := session.options["checkpoints"]:
            policy = Policy.of(wanted)
            run = f"the run in {session.options['run_dir']}"
            lock = Lock(Path(policy.directory), run, session.key)
            report, waiting = self.teller.checkpoint, world.progress.waiting

            def nodes() -> int:
                return len({world.hosts[process] for process in world.membership.active})

            drained = "drain" in session.options["spares_do"]
            self.checkpoints = Checkpoints(
                policy, lock, report, waiting, world.link, nodes, drained
            )
        world.restorable = self.checkpoints is not None

    def _lapped(self, lap: Lap) -> None:
        self.teller.lapped(lap)
        if link := self.session.world.link:
            link.send("lap", **asdict(replace(lap, metrics={})))
