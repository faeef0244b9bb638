"""Batch jobs in the lab, for tests."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster, LabError
from training import PROGRAM, STORIES, tails, wait_for

from hpcft.slurm.scontrol import fields
from hpcft.telemetry import events as log

#: Which python a script finds.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@dataclass
class Job:
    """A batch job.

    folder: where it runs.
    out: its output, all restarts'.
    """

    cluster: Cluster
    number: str
    folder: Path
    out: Path

    @classmethod
    def submit(cls, cluster: Cluster, folder: Path, *words: str, name: str = "job") -> Job:
        """Submit ``words``, which are options of sbatch, a script and its arguments."""
        folder.mkdir(exist_ok=True)
        out = folder / f"{name}.out"
        done = cluster.run(
            *("sbatch", "--parsable", "--open-mode=append", f"--output={out}"),
            *(f"--chdir={folder}", f"--export=ALL,PATH={PATH},OMP_NUM_THREADS=1"),
            *words,
        )
        if done.returncode:
            raise LabError(done.stderr)
        job = cls(cluster, done.stdout.strip(), folder, out)
        STORIES.append(job.story)
        return job

    @property
    def output(self) -> str:
        return self.out.read_text(errors="replace") if self.out.exists() else ""

    def story(self) -> str:
        """What is known of it."""
        told = [f"{name}={value}" for name, value in self.shown().items()]
        files = sorted(self.folder.glob("hpcft-runs/*/events.jsonl"))
        return "\n".join(["  ".join(told), *tails(self.out, *files)])

    def shown(self) -> dict[str, str]:
        """What ``scontrol show job`` tells."""
        done = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return fields(done.stdout.partition("\n")[0])

    def wait_for_state(self, *states: str, seconds: float = 90) -> dict[str, str]:
        """Wait until Slurm has it in one of these states; what it shows then."""

        def found() -> dict[str, str]:
            shown = self.shown()
            return shown if shown["JobState"] in states else {}

        return dict(wait_for(f"{states}\n{self.output}", found, seconds))

    def wait_for_step(self, step: int) -> None:
        """Wait until a rank 0 that was started since the last look has completed so many steps."""

        def found() -> bool:
            newest = self.output.rpartition("restored from")[2]
            return any(int(n) >= step for n in re.findall(r"^step (\d+) rank 0", newest, re.M))

        wait_for(f"step {step} of job {self.number}:\n{self.output}", found, 120)

    def wait_for_restart(self, times: int) -> None:
        """Wait until it has been restarted so often and goes on."""
        wait_for(
            f"restart {times} of job {self.number}",
            lambda: self.output.count("restored from") >= times,
            120,
        )

    def signal(self, *how: str) -> None:
        """Send its steps what Slurm warns them with."""
        self.cluster.run("scancel", "--signal=USR1", *how, self.number)

    def summaries(self) -> list[dict[str, Any]]:
        """Those of its runs, the first first."""
        found = sorted(self.folder.glob("hpcft-runs/*/summary.json"), key=os.path.getmtime)
        return [summary for file in found if (summary := _read(file))]

    def events(self, restart: int) -> list[log.Event]:
        """Those of one of its runs."""
        suffix = f"-r{restart}" if restart else ""
        return list(log.read(self.folder / f"hpcft-runs/{self.number}.0{suffix}/events.jsonl"))


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def training(
    cluster: Cluster,
    folder: Path,
    *program: str,
    options: tuple[str, ...],
    often: tuple[str, ...] = ("--ckpt-every", "1000"),
) -> Path:
    """A batch script that ``hpcft sbatch`` has written for a training of the tests' program.

    Parameters
    ----------
    options: of ``hpcft sbatch``.
    often: options of the run: when it saves.
    """
    done = cluster.run(
        *(sys.executable, "-m", "hpcft.cli.main", "sbatch", *options),
        *("--ckpt-dir", str(folder / "checkpoints"), "--", *often),
        *(str(PROGRAM), *program),
    )
    if done.returncode:
        raise LabError(done.stderr)
    script = folder / "job.sh"
    script.write_text(done.stdout)
    return script
