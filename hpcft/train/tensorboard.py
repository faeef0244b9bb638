"""What TensorBoard shows of a training: its metrics by step, and the run's own figures.

Every process has a board, and the one that is logical rank 0 writes to it. Whenever another takes
over, or the run goes back to an earlier step, a new file of events begins, which says from which
step on those before are not to be shown. Files are numbered, for TensorBoard reads them in the
order of their names, and nodes' clocks differ.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from hpcft.telemetry.laps import Lap
from hpcft.train.pace import numbers

#: Seconds from one writing to the next, and until another is tried after one that has failed.
_PERIOD, _AGAIN = 1.0, 10.0
#: Entries that wait at most; beyond that, on a file system that hangs, the oldest are lost.
_MOST = 100_000
#: Seconds that the end of the training waits for the last to be written.
_LAST_TIME = 3.0


@dataclass(frozen=True)
class _Entry:
    """What is to be written of a step.

    anew: nothing of this step or of later ones holds any more.
    """

    step: int
    scalars: Mapping[str, float] = field(default_factory=dict)
    title: str = ""
    text: str = ""
    anew: bool = False
    time: float = field(default_factory=time.time)


class Board:
    """Of one process. What it costs a step is an entry in a queue; a thread writes.

    Parameters
    ----------
    folder: where the files of events go.
    tell: called, in any thread, with what is to be said at the terminal.
    """

    def __init__(self, folder: Path, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._tell = tell
        self._come: deque[_Entry] = deque(maxlen=_MOST)
        self._unwritten: list[_Entry] = []
        self._writer: EventsWriter | None = None
        self._newest = -1
        self._told = False
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()

    def goes_on(self, step: int) -> None:
        """The run goes on after ``step``, whatever was done before."""
        # Who has written nothing begins a file in any case.
        if self._thread:
            self._put(_Entry(step + 1, anew=True))

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is completed by logical rank 0, which is this process."""
        self._put(_Entry(step, numbers(metrics)))

    def lapped(self, lap: Lap, ranks: int) -> None:
        """A lap of logical rank 0 is over, of so many ranks."""
        seconds = lap.ended - lap.began
        scalars = {
            "hpcft/ranks": float(ranks),
            "hpcft/seconds_per_step/computing": lap.compute / lap.steps,
            "hpcft/seconds_per_step/waiting": lap.waiting / lap.steps,
            "hpcft/seconds_per_step/saving": lap.saving / lap.steps,
        }
        if seconds > 0:
            scalars["hpcft/steps_per_second"] = lap.steps / seconds
        self._put(_Entry(lap.last, scalars))

    def failed(self, step: int, text: str, seconds: float | None = None) -> None:
        """A failure has hit what came after a step.

        Parameters
        ----------
        seconds: that the recovery from it has taken; None if it was none in place.
        """
        scalars = {} if seconds is None else {"hpcft/recovery_seconds": seconds}
        self._put(_Entry(step + 1, scalars, "hpcft/failures", text))

    def _put(self, entry: _Entry) -> None:
        self._come.append(entry)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpcft-board", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Training is over: wait a moment for what is not written yet."""
        self._closing.set()
        if self._thread:
            self._thread.join(_LAST_TIME)

    def _run(self) -> None:
        pause = _PERIOD
        while not self._closing.wait(pause):
            pause = _PERIOD if self.write() else _AGAIN
        self.write()
        self._drop()

    def write(self) -> bool:
        """Write what has come, which the thread does every second; what fails is kept.

        Returns
        -------
        Whether all is written.
        """
        with self._lock:
            entries = [*self._unwritten, *(self._come.popleft() for _ in range(len(self._come)))]
            self._unwritten = entries[-_MOST:]
            try:
                for entry in self._unwritten:
                    self._add(entry)
                if self._writer:
                    self._writer.flush()
            except OSError as error:
                if not self._told:
                    self._told = True
                    self._tell(f"hpcft: TensorBoard's files cannot be written: {error}")
                # What is in the file ends in the middle of something: the next begins anew.
                self._drop()
                return False
            self._unwritten, self._told = [], False
            return True

    def _add(self, entry: _Entry) -> None:
        if entry.anew:
            # All that was written may be of steps before that.
            if entry.step <= self._newest:
                self._drop()
            return
        if self._writer is None:
            self._begin(entry.step)
        self._newest = entry.step
        for name, value in entry.scalars.items():
            self._event(entry, summary.scalar(name, value))
        if entry.text:
            self._event(entry, summary.text(entry.title, entry.text))

    def _event(self, entry: _Entry, content: summary.Summary) -> None:
        assert self._writer is not None
        self._writer.write_event(Event(wall_time=entry.time, step=entry.step, summary=content))

    def _begin(self, step: int) -> None:
        """A new file, from a step on."""
        self._writer = _next_file(self._folder)
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=start))

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer:
            # A full disk has been told of.
            with contextlib.suppress(OSError):
                writer.close()


def write_once(folder: Path, step: int, scalars: Mapping[str, float]) -> None:
    """Write what is known of one step to a file of its own, which is whole when this returns.

    For several processes that write now and then, and nothing that has to be taken back.

    Raises
    ------
    OSError: it cannot be written.
    """
    writer = _next_file(folder)
    for name, value in scalars.items():
        content = summary.scalar(name, value)
        writer.write_event(Event(wall_time=time.time(), step=step, summary=content))
    writer.close()


def _next_file(folder: Path) -> EventsWriter:
    """A file of events that comes after those there are."""
    folder.mkdir(parents=True, exist_ok=True)
    found = (re.match(r"events\.(\d+)\.", path.name) for path in folder.iterdir())
    number = 1 + max((int(match[1]) for match in found if match), default=0)
    return EventsWriter(str(folder / f"events.{number:06d}"))
