"""Running a training for a test: start it, watch it, harm it, read what it left."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from hpcft.world.progress import shepherd_of

HERE = Path(__file__).parent
PROGRAM = HERE / "programs" / "train.py"
#: Tell what is known of the runs that the test under way has started.
STORIES: list[Callable[[], str]] = []


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until ``condition`` gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.01)
    return found


def tails(*files: Path) -> list[str]:
    """The last lines of those files that are there, each under its name."""
    told = []
    for file in files:
        if file.exists():
            lines = file.read_text(errors="replace").splitlines()
            told += [f"-- {file.name}, the last of {len(lines)} lines", *lines[-50:]]
    return told


@dataclass
class Training:
    """A run of hpcft in the background.

    prefix: what comes before ``python -m hpcft.run``, such as srun and its options.
    """

    run_dir: Path
    options: list[str]
    program: list[str] = field(default_factory=lambda: [str(PROGRAM)])
    prefix: list[str] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def start(self) -> Training:
        command = [*self.prefix, sys.executable, "-m", "hpcft.run"]
        command += ["--run-dir", str(self.run_dir), *self.options, *self.program]
        self.output_file = self.run_dir.with_suffix(".out")
        with self.output_file.open("wb") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**self.environ, "OMP_NUM_THREADS": "1"},
            )
        STORIES.append(self.story)
        return self

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace")

    def ranks(self) -> list[dict[str, Any]]:
        """The entries of ranks.json, once it is there."""
        file = self.run_dir / "ranks.json"
        wait_for("ranks.json", lambda: file.exists() or self.process.poll() is not None)
        assert file.exists(), self.output
        entries: list[dict[str, Any]] = json.loads(file.read_text())["ranks"]
        return entries

    def entry(self, logical: int) -> dict[str, Any]:
        return next(entry for entry in self.ranks() if entry["logical"] == logical)

    def step(self) -> int:
        """The highest step any rank has said it has completed."""
        texts = [log.read_text(errors="replace") for log in self.run_dir.glob("logs/*.log")]
        return max(
            (int(n) for text in texts for n in re.findall(r"^step (\d+)", text, re.M)), default=0
        )

    def wait_for_step(self, step: int) -> None:
        wait_for(
            f"step {step}", lambda: self.step() >= step or self.process.poll() is not None, 120
        )
        assert self.process.poll() is None, f"ended before step {step}:\n{self.output}"

    def mpiexec(self) -> int:
        """The process that has started the shepherds, on one machine."""
        shepherd = shepherd_of(self.entry(0)["pid"])
        assert shepherd is not None
        return psutil.Process(shepherd).ppid()

    def send(self, logical: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to the process that plays a logical rank."""
        os.kill(self.entry(logical)["pid"], number)

    def wait(self, code: int = 0, seconds: float = 120) -> None:
        """Wait for the end, and expect this exit code."""
        try:
            got = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"hangs:\n{self.output}\n{self.events()}") from None
        assert got == code, f"exit code {got}:\n{self.output}"

    def finish(self, code: int = 0, seconds: float = 120) -> dict[str, Any]:
        """Wait for the end, expect this exit code, return the summary."""
        self.wait(code, seconds)
        return self.summary()

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.run_dir / "summary.json").read_text())
        return summary

    def events(self) -> list[dict[str, Any]]:
        file = self.run_dir / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def logs(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.run_dir.glob("logs/*.log")))

    def story(self) -> str:
        """What is known of it."""
        code = self.process.poll()
        state = "runs" if code is None else f"ended with {code}"
        told = [f"{self.run_dir}: {state}, step {self.step()}"]
        files = [self.output_file, self.run_dir / "events.jsonl"]
        return "\n".join(told + tails(*files, *sorted(self.run_dir.glob("logs/*.log"))))

    def stop(self) -> None:
        """End it, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


#: Digests of undisturbed runs are known after multiples of so many steps, up to so many.
STRIDE, MOST_STEPS = 12, 144


@functools.cache
def undisturbed(nproc: int) -> dict[int, str]:
    """Digests of the parameters of so many ranks to which nothing happens, by the step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Training(Path(folder) / "run", ["--nproc", str(nproc)])
        run.program += ["--steps", str(MOST_STEPS), "--digest-every", str(STRIDE), "--pace", "0"]
        summary = run.start().finish()
        digests = {int(n): d for n, d in re.findall(r"^after step (\d+): (\w+)", run.logs(), re.M)}
    assert summary["failures"] == []
    assert digests[MOST_STEPS] == summary["params_sha256"]
    return digests


def kill_at_start(path: Path, rank: int, shepherd_after: float | None = None) -> None:
    """With ``path`` in PYTHONPATH a rank dies before it has come to MPI; the others wait.

    Parameters
    ----------
    shepherd_after: it is not the rank that dies but its shepherd, so many seconds after its start.
    """
    (path / "sitecustomize.py").write_text(
        "import faulthandler, os, threading, time\n"
        "def die():\n"
        f"    if os.environ.get('PMIX_RANK') == '{rank}':\n"
        "        os.kill(os.getpid(), 9)\n"
        "def begin(*_, **__):\n"
        f"    {shepherd_after} is None and die()\n"
        "    time.sleep(600)\n"
        "command = open('/proc/self/cmdline', 'rb').read().split(bytes(1))\n"
        f"if b'hpcft.run' in command and {shepherd_after} is not None:\n"
        f"    threading.Timer({shepherd_after or 0}, die).start()\n"
        "if b'hpcft.world.rank' in command:\n"
        # What a rank calls first.
        "    faulthandler.enable = begin\n"
    )


def family(run_dir: Path) -> list[int]:
    """All processes whose command line or environment names the run directory."""
    mark = str(run_dir).encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                home = Path("/proc") / name
                if mark in (home / "cmdline").read_bytes() + (home / "environ").read_bytes():
                    found.append(int(name))
    return found


def kill_all(run: Training) -> None:
    for entry in run.ranks():
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry["pid"], signal.SIGKILL)


def launched(run: Training, times: int) -> None:
    """Wait until training has begun so often."""
    wait_for(
        f"start {times}",
        lambda: (
            sum(event["kind"] == "start" for event in run.events()) == times
            or run.process.poll() is not None
        ),
    )
    assert run.process.poll() is None, run.output


def warm(run: Training) -> list[psutil.Process]:
    """The processes that the run's ranks are forked from, with those that preload modules."""
    ranks = {entry["pid"] for entry in run.ranks()}
    return [
        process
        for process in running(run, "hpcft.world.rank")
        if process.pid not in ranks and process.name() != "hpcft-minder"
    ]


def running(run: Training, part: str) -> list[psutil.Process]:
    """The run's processes with ``part`` in their command line."""
    found = []
    for pid in family(run.run_dir):
        with contextlib.suppress(psutil.Error):
            if part in " ".join(psutil.Process(pid).cmdline()):
                found.append(psutil.Process(pid))
    return found
