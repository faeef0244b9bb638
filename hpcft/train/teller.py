"""What the user is told of a training: at the terminal, in the run's journal, by TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcft.telemetry.laps import Lap
from hpcft.telemetry.rundir import RunDirectory
from hpcft.train.console import ProgressLine
from hpcft.train.heartbeat import Heartbeat
from hpcft.world.link import Failure
from hpcft.world.recovery import Recovered
from hpcft.world.session import Session

if TYPE_CHECKING:
    from hpcft.train.tensorboard import Board


class Teller:
    """Says what happens, if this process is the one to say it, and writes it down.

    Parameters
    ----------
    session: has the journal, and says how much is wanted at the terminal.
    """

    def __init__(self, session: Session) -> None:
        options = session.options
        self._world = session.world
        self._journal = session.journal
        self._line = ProgressLine(options["terminal"]) if options["verbose"] else None
        self._every_event = options["verbose"] >= 2
        self._heart = (
            Heartbeat(RunDirectory(Path(options["run_dir"])), session.world)
            if session.journal
            else None
        )
        self._unsaid: list[str] = []
        self._board: Board | None = None
        self._began = False
        if folder := options.get("tensorboard"):
            # Few want it, and it is slow to import.
            from hpcft.train.tensorboard import Board

            self._board = Board(Path(folder), self.say)

    def say(self, text: str) -> None:
        """A line at the terminal, of whatever rank."""
        if self._line:
            self._line.say(text)

    def checkpoint(self, kind: str, step: int, detail: dict[str, Any]) -> None:
        """Something has become of a checkpoint; from any thread."""
        if self._journal:
            self._journal.note(kind, step, detail)
        if kind == "unlocked" and not self._every_event:
            return
        if self._line and (said := _checkpoint_in_words(kind, step, detail)):
            if self._world.logical == 0:
                self._line.say(said)
            else:
                # A spare that is being adopted is not heard yet.
                self._unsaid.append(said)

    def shared_out(self, step: int, weights: Sequence[int]) -> None:
        """From about the next step on the batch is shared out anew."""
        if self._world.logical != 0:
            return
        total = sum(weights)
        shares = [round(weight / total, 4) for weight in weights]
        if self._journal:
            self._journal.note("shares", step, {"shares": shares})
        even = 1 / len(weights)
        least, most = min(shares), max(shares)
        self.say(
            f"hpcft: step {step}: the batch is shared out by speed: rank {shares.index(most)} has "
            f"{most / even:.2f} times an even share, rank {shares.index(least)} "
            f"{least / even:.2f} times"
        )

    def started(self) -> None:
        """Training begins."""
        if self._journal:
            self._journal.started()

    def saved_by(self, step: int) -> int:
        """How many ranks trained when the newest checkpoint, of ``step``, was saved."""
        launched = len(self._world.launched.active)
        return self._journal.saved_by(step) if self._journal else launched

    def restored(self, step: int) -> None:
        """The script, run for the first time or anew, trains from ``step``."""
        if self._line:
            self._line.begin(step)
        if self._journal:
            self._journal.restored(step)
        if self._heart and self._world.logical == 0:
            self._heart.at(step, {})
        if self._board:
            self._board.goes_on(step)
            if self._journal and self._world.logical == 0 and not self._began:
                why = self._journal.launched_again_for()
                if why:
                    self._board.failed(step, f"All ranks were launched again: {why}")
            self._began = True

    def stepped(self, step: int, size: int, metrics: dict[str, float]) -> None:
        """A step is completed."""
        if self._line and self._unsaid:
            for said in self._unsaid:
                self._line.say(said)
            self._unsaid.clear()
        if self._journal:
            self._say(self._journal.stepped(step))
            self._say_spares(self._journal.spares_lost(step))
        if self._heart and self._world.logical == 0:
            self._heart.at(step, metrics)
        if self._board and self._world.logical == 0:
            self._board.stepped(step, metrics)
        if self._line and self._world.logical == 0:
            self._line.step(step, size, metrics)

    def recovered(self, recovery: Recovered) -> None:
        """The world has healed."""
        if self._journal:
            self._journal.recovered(recovery)
        if self._board and not recovery.transfer.anew:
            self._board.goes_on(recovery.transfer.step)

    def lapped(self, lap: Lap) -> None:
        """A lap of this process's is over."""
        if self._board and self._world.logical == 0:
            self._board.lapped(lap, len(self._world.membership.active))

    def close(self) -> None:
        """Training is over here, and all is told."""
        if self._board:
            self._board.close()

    def finished(self, step: int, digest: str | None) -> None:
        """All ranks have agreed that training is over."""
        self.tell()
        self.close()
        if self._journal:
            self._say_spares(self._journal.spares_lost(step, patience=0))
            self._journal.finished(step, digest)

    def interrupted(self, step: int, reason: str, newest: int) -> None:
        """All ranks have agreed to leave, as the run was asked to end.

        Parameters
        ----------
        newest: the step of the newest checkpoint; -1 for none.
        """
        self.tell()
        self.close()
        if self._journal:
            self._journal.interrupted(step, reason, newest)
        if self._line and self._world.logical == 0:
            self._line.say(
                f"hpcft: {reason}: left at step {step}; "
                + (f"the next start goes on from step {newest}" if newest >= 0 else "nothing saved")
            )

    def tell(self) -> None:
        """Tell now what was to be told when more of it is known."""
        if self._journal:
            self._say(self._journal.tell(patience=0))

    def _say_spares(self, lost: list[Failure]) -> None:
        for failure in lost if self._line else ():
            assert self._line is not None
            host, cause = self._world.hosts[failure.rank], failure.cause or "unknown"
            self._line.say(f"hpcft: spare {failure.rank} on {host} failed ({cause})")

    def _say(self, told: list[Recovered]) -> None:
        if self._world.logical != 0:
            return
        for recovery in told:
            assert self._world.link is not None
            text = _in_words(recovery, self._world.link.failures, self._world.hosts)
            if self._line:
                self._line.say(f"hpcft: {text}")
            if self._board:
                seconds = recovery.ended - recovery.began
                self._board.failed(max(0, recovery.transfer.step), text, seconds)


def _checkpoint_in_words(kind: str, step: int, detail: Mapping[str, Any]) -> str:
    if kind == "restore":
        return f"hpcft: going on from step {step}, restored from {detail['path']}"
    if kind == "damaged" and "copies" in detail:
        return f"hpcft: of the checkpoint of step {step} {detail['why']}"
    if kind == "damaged":
        return f"hpcft: the checkpoint of step {step} is no good: {detail['why']}"
    if kind == "layout" and detail["layout"] == "per-rank":
        return f"hpcft: each rank writes checkpoints to a file of its own, {detail['why']}"
    if kind == "copies failed":
        return f"hpcft: the checkpoint of step {step} near the ranks has {detail['why']}"
    if kind in ("occupied", "unlocked", "interval", "drain failed"):
        return f"hpcft: {detail['why']}"
    if kind == "save failed":
        return f"hpcft: {detail['why']}; training goes on without it"
    if kind == "unsaved":
        newest = detail["newest"]
        said = f"the newest checkpoint is of step {newest}" if newest >= 0 else "nor any before"
        return f"hpcft: training has ended, but its last step, {step}, is not saved; {said}"
    return ""


def _in_words(
    recovery: Recovered, failures: Mapping[int, Failure], hosts: Mapping[int, str]
) -> str:
    healing = recovery.healing
    adopted = {adoption.failed: adoption.world for adoption in healing.adoptions}
    said = []
    for world in healing.dead:
        failure = failures.get(world)
        logical = healing.before.logical(world)
        name = f"spare {world}" if logical is None else f"rank {logical}"
        then = ""
        if world in adopted:
            then = f", process {adopted[world]} on {hosts[adopted[world]]} took over"
        cause = (failure.cause if failure else "") or "unknown"
        said.append(f"{name} on {hosts[world]} failed ({cause}){then}")
    for one in healing.replaced:
        said.append(
            f"rank {one.logical} on {hosts[one.failed]} is slow and became a spare, process "
            f"{one.world} on {hosts[one.world]} took over"
        )
    active, spares = len(healing.after.active), len(healing.after.spares)
    step, milliseconds = recovery.transfer.step, 1000 * (recovery.ended - recovery.began)
    whence = ""
    if recovery.transfer.anew:
        whence = f", from the checkpoint of step {step}" if step else ", from the beginning"
    return (
        f"{'; '.join(said)}. Going on at step {step} with {active} ranks and {spares} spares"
        f"{whence}, recovered in {milliseconds:.0f} ms"
    )
