"""Starting the workload under hpcft and under torchrun, and reading what it noted."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Stamp:
    """A completed step."""

    step: int
    time: float
    pid: int


class Run:
    """One run of the workload in the background; use as a context manager.

    Parameters
    ----------
    launcher: the command that starts ``workload.py``, up to the script.
    arguments: the workload's.
    enter: called in the new process before the command begins.
    """

    def __init__(
        self,
        launcher: list[str],
        arguments: list[str],
        enter: Callable[[], None] | None = None,
    ) -> None:
        # In memory, for the peer's checkpoint is to be as quick as can be.
        self.path = Path(tempfile.mkdtemp(prefix="hpcft-benchmark-", dir="/dev/shm"))
        self._stamps = self.path / "stamps"
        command = [*launcher, str(HERE / "workload.py"), "--stamps", str(self._stamps), *arguments]
        command = [word.replace("{path}", str(self.path)) for word in command]
        self._log = (self.path / "log").open("wb")
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=enter,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
                # Without it torchrun's restarted ranks meet addresses of the dead, and fail again.
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            },
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def stamps(self) -> list[Stamp]:
        """All steps completed so far."""
        with contextlib.suppress(FileNotFoundError):
            fields = [line.split() for line in self._stamps.read_text().splitlines()]
            return [Stamp(int(f[0]), float(f[1]), int(f[2])) for f in fields if len(f) == 3]
        return []

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = 300) -> Any:
        """Wait until ``condition`` gives something, and return that."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.path / "log").read_text(errors="replace")
                raise SystemExit(f"waited in vain for {what}:\n{log[-3000:]}")
            time.sleep(0.01)
        return found

    def stages(self) -> list[tuple[int, str, float]]:
        """What each process has come to, and when: number, stage, seconds since 1970."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.path / "stages").read_text().splitlines()
            fields = [line.split() for line in lines]
            return [(int(f[0]), f[1], float(f[2])) for f in fields if len(f) == 3]
        return []

    def more_steps(self, count: int) -> None:
        """Wait for so many more steps."""
        there = len(self.stamps())
        self.wait_for(f"{count} steps", lambda: len(self.stamps()) >= there + count)


class HpcftRun(Run):
    """The workload under hpcft; ``nproc`` may be something like ``3:4``."""

    def __init__(
        self,
        nproc: int | str,
        spares: int,
        arguments: list[str],
        *options: str,
        enter: Callable[[], None] | None = None,
    ) -> None:
        launcher = [sys.executable, "-m", "hpcft.run", "--run-dir", "{path}/run", "--no-digest"]
        launcher += ["--nproc", str(nproc), "--spares", str(spares), *options]
        super().__init__(launcher, arguments, enter)

    def ranks(self) -> list[dict[str, Any]]:
        """The active ranks' entries."""
        table = json.loads((self.path / "run" / "ranks.json").read_text())
        return [entry for entry in table["ranks"] if entry["role"] == "active"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far."""
        file = self.path / "run" / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


class TorchrunRun(Run):
    """The workload under torchrun, which restarts it as often as need be."""

    def __init__(self, nproc: int, arguments: list[str]) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(nproc), "--max-restarts", "1000"]
        # A machine need not know its own name.
        launcher += ["--monitor-interval", "0.1", "--local-addr", "127.0.0.1"]
        super().__init__(launcher, ["--checkpoint", "{path}/checkpoint", *arguments])

    def workers(self) -> list[int]:
        """Process numbers of the ranks."""
        return [pid for pid in _children(self.process.pid) if b"workload.py" in _command(pid)]


def step_time(stamps: list[Stamp]) -> float:
    """Median length of a step, in seconds."""
    return median(b.time - a.time for a, b in itertools.pairwise(stamps))


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def born(pid: int) -> float:
    """When a process was made; seconds since 1970, to a hundredth."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


def machine() -> str:
    """This machine, in a line."""
    cpus = Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(":")[1].strip() for line in cpus.splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, {memory:.0f} GiB, {time.strftime('%Y-%m-%d')}"
