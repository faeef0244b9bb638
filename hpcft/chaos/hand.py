"""``python -m hpcft.chaos.hand``: does one fault on this host, and undoes it.

It gets the fault as a line of JSON and answers with lines of JSON: ``{"refused": why}``, or
``{"done": time}`` and then ``{"undone": time}``. When its input ends, whoever had sent it is gone,
and the fault is over, too.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hpcft.chaos import notes
from hpcft.chaos.clock import Clock
from hpcft.chaos.faults import Fault, Task
from hpcft.chaos.network import Cut, Lossy
from hpcft.chaos.notes import Note
from hpcft.chaos.processes import Hang, Kill, Memory, Node, Slow
from hpcft.chaos.storage import Corrupt, Full, SlowDisk
from hpcft.errors import HpcftError

_FAULTS: dict[str, type[Fault]] = {
    "kill": Kill,
    "node": Node,
    "hang": Hang,
    "slow": Slow,
    "cut": Cut,
    "lossy": Lossy,
    "memory": Memory,
    "full": Full,
    "slow-disk": SlowDisk,
    "corrupt": Corrupt,
    "clock": Clock,
}


def main() -> int:
    """Do what the input says; the exit code is 1 if something is left to be undone."""
    plain = json.loads(sys.stdin.readline())
    if "undo" in plain:
        return _undo_left(Path(plain["undo"]))
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    threading.Thread(target=_until_input_ends, args=(over,), daemon=True).start()
    lists = {name: tuple(plain[name]) for name in ("pids", "peers")}
    task = Task(**{**plain, **lists, "run_dir": Path(plain["run_dir"])})
    return _do(task, over)


def _until_input_ends(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


def _do(task: Task, over: threading.Event) -> int:
    fault = _FAULTS[task.kind]()
    try:
        how = fault.prepare(task)
        note = notes.write(task.run_dir, Note(task.kind, socket.gethostname(), how))
    except (HpcftError, OSError) as error:
        return _say(refused=error.line if isinstance(error, HpcftError) else str(error))
    try:
        at = time.time()
        fault.do(how)
        _say(done=at)
        if task.seconds:
            fault.hold(how, over, task.seconds)
    except (HpcftError, OSError) as error:
        _say(refused=error.line if isinstance(error, HpcftError) else str(error))
    finally:
        fault.undo(how)
        notes.remove(note)
    return _say(undone=time.time())


def _undo_left(run_dir: Path) -> int:
    """Undo what others have left on this host."""
    failed = 0
    for path, note in notes.left(run_dir):
        if note.host == socket.gethostname() and note.kind in _FAULTS:
            try:
                _FAULTS[note.kind]().undo(note.how)
                notes.remove(path)
                _say(cleared=note.kind)
            except (HpcftError, OSError, LookupError, ValueError) as error:
                failed = 1
                _say(kept=note.kind, why=str(error))
    return failed


def _say(**said: Any) -> int:
    # Whoever asked may be gone.
    try:
        print(json.dumps(said), flush=True)
    except OSError:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
