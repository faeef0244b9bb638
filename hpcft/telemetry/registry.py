"""Where a user's runs are: a small file a run, in the user's state directory.

``$XDG_STATE_HOME/hpcft/runs/``, or ``~/.local/state/hpcft/runs/``; on a cluster the nodes share the
home directory, and so one file serves all of them. A run that starts writes its file and never
comes back to it: whether it still runs is found out by who asks. So there is nothing a kill could
leave wrong, and nothing to keep running.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A run that was started.

    run_dir: its directory.
    host: name of the host of the process that stands for it.
    pid: number of that process, which ends the run in order when it gets SIGTERM.
    born: what tells that process from others of the same number.
    job: Slurm's number of the job it is in; empty outside of Slurm.
    step: Slurm's number of the step that is the run; empty if srun has not started it.
    checkpoints: directory of its checkpoints; empty if it saves none.
    command: its command line.
    begun: when it was started; seconds since 1970.
    """

    run_dir: str
    host: str
    pid: int
    born: str
    job: str = ""
    step: str = ""
    checkpoints: str = ""
    command: tuple[str, ...] = ()
    begun: float = field(default_factory=time.time)

    @property
    def name(self) -> str:
        """What people call it: its step, or else the last part of its directory's name."""
        return f"{self.job}.{self.step}" if self.step else Path(self.run_dir).name

    @property
    def file(self) -> Path:
        """Where it is kept. A run in the same directory takes its place."""
        where = self.run_dir if self.step else f"{self.host}:{self.run_dir}"
        return folder() / f"{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"

    @property
    def here(self) -> bool:
        """Whether the process that stands for it would be one of this host."""
        return self.host == host()

    @property
    def alive(self) -> bool:
        """Whether that process runs; only :attr:`here`."""
        return born(self.pid) == self.born


def folder() -> Path:
    """Where the entries are."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state else Path.home() / ".local" / "state") / "hpcft" / "runs"


def host() -> str:
    """This host's name, without its domain."""
    return socket.gethostname().split(".")[0]


def born(pid: int) -> str:
    """When a process of this host has begun, by the kernel's clock; empty if there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot} {fields[19]}"


def add(entry: Entry) -> None:
    """Keep an entry.

    Raises
    ------
    OSError: it cannot be written.
    """
    file = entry.file
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = file.with_name(f".{file.name}.{entry.host}.{entry.pid}")
    aside.write_text(json.dumps(asdict(entry)) + "\n")
    aside.replace(file)


def remove(entry: Entry) -> None:
    """Forget an entry, if it has not been replaced."""
    if entry in entries():
        with contextlib.suppress(OSError):
            entry.file.unlink()


def entries() -> list[Entry]:
    """All there are, the oldest first; what cannot be read is left out."""
    found = []
    for file in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            fields = json.loads(file.read_text())
            found.append(Entry(**{**fields, "command": tuple(fields["command"])}))
    return sorted(found, key=lambda entry: entry.begun)
