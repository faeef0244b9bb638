"""A day of a cluster in a minute: whatever befalls a job, it finishes right or says why not.

``python tests/fault/day.py --runs 100`` has Slurm, in the lab, run a preemptible job time after
time, and lets happen to it what does in a day: ranks and nodes die, links are cut, nodes freeze and
are drained, the job is warned, preempted and requeued, the file system for checkpoints is full for
a while, slurmctld dies and comes back. Times and victims follow from a seed, which is printed. A
job that completes has to have the parameters of an undisturbed run, if it was of as many ranks all
the time; one that fails has to say why, and what it has saved has to be good. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "slurm"))

from batch import Job, training
from cluster import Cluster
from training import undisturbed, wait_for

from hpcft.telemetry import events as log

#: Where the checkpoints go: a file system of its own.
PLACE = Path("/var/tmp/hpcft-day")
_SIZE = 256 << 20
_STEPS = 120
#: Seconds in which things happen, and in which a job must have ended after them.
_DAY, _EVENING = 60.0, 300.0
_ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")


@dataclass(frozen=True)
class Deed:
    """Something that happens.

    at: seconds after the job has begun to train.
    lasts: seconds until it is undone.
    """

    at: float
    what: str
    node: str
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:.0f} s {self.what} {self.node}"


KINDS = (
    *("kill rank", "kill rank", "kill node", "cut", "freeze", "drain"),
    *("warn", "preempt", "requeue", "full disk", "controller"),
)


def draw(seed: str, nodes: list[str]) -> list[Deed]:
    """What happens in one day."""
    chance = random.Random(seed)
    times = sorted(chance.uniform(2, _DAY) for _ in range(chance.randint(2, 5)))
    return [
        Deed(at, chance.choice(KINDS), chance.choice(nodes), chance.uniform(0.3, 12))
        for at in times
    ]


class Day:
    """One job, and what happens to it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        folder.mkdir()
        self.until = folder / "hurry"
        program = ("--steps", str(_STEPS), "--pace", "0.6", "--until", str(self.until))
        options = ("--nodes", "3", "--spares", "1", "--ranks-per-node", "1", "--time", "60:00")
        often = ("--ckpt-every", "10", "--ckpt-near", "5", "--ckpt-timeout", "20")
        script = training(
            cluster, folder, *program, options=(*options, "--partition", "low"), often=often
        )
        self.job = Job.submit(cluster, folder, str(script))

    def live(self, deeds: list[Deed]) -> str:
        """Let it all happen.

        Returns
        -------
        What is wrong; empty if nothing is.
        """
        self.job.wait_for_step(2)
        began = time.monotonic()
        undoing: list[threading.Timer] = []
        for deed in deeds:
            time.sleep(max(0.0, began + deed.at - time.monotonic()))
            undo = self._do(deed)
            if undo:
                undoing.append(threading.Timer(deed.lasts, undo))
                undoing[-1].start()
        for timer in undoing:
            timer.join()
        self.cluster.revive_nodes()
        self.until.touch()
        try:
            wait_for("its end", self._has_ended, _EVENING)
        except AssertionError:
            return "it does not end"
        results = [summary["result"] for summary in self.job.summaries()]
        # A job whose script went with its node is cancelled when its run is over.
        completed = self.job.shown()["JobState"] == "COMPLETED" or results[-1:] == ["ok"]
        return self._completed() if completed else self._failed()

    def _has_ended(self) -> bool:
        # What is requeued is for a moment in a state in which others end.
        queued = self.cluster.run("squeue", "--noheader", f"--jobs={self.job.number}")
        return not queued.stdout.strip() and self.job.shown()["JobState"] in _ENDS

    def _do(self, deed: Deed) -> Callable[[], object] | None:
        cluster, node = self.cluster, deed.node
        if deed.what == "kill rank":
            self._kill_rank(deed)
        elif deed.what == "kill node":
            cluster.kill_node(node)
            cluster.write_off(node)
            return cluster.revive_nodes
        elif deed.what == "cut":
            cluster.cut(node)
            return lambda: cluster.heal(node)
        elif deed.what == "freeze":
            cluster.freeze(node)
            return lambda: cluster.thaw(node)
        elif deed.what == "drain":
            cluster.drain(node)
            return lambda: cluster.undrain(node)
        elif deed.what == "warn":
            self.job.signal()
        elif deed.what == "requeue":
            cluster.run("scontrol", "requeue", self.job.number)
        elif deed.what == "preempt":
            words = [f"--nodelist={node}", "--exclusive", "sleep", "1"]
            cluster.start("srun", *words, stderr=subprocess.DEVNULL)
        elif deed.what == "full disk":
            with contextlib.suppress(OSError), (PLACE / "full").open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, _free(PLACE))
            return lambda: (PLACE / "full").unlink(missing_ok=True)
        elif deed.what == "controller":
            cluster.kill_controller()
            return cluster.start_controller
        return None

    def _kill_rank(self, deed: Deed) -> None:
        pids = [p for p in self.cluster.processes(deed.node) if _is_rank(p)]
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(max(pids), signal.SIGKILL)

    def _completed(self) -> str:
        last = self.job.summaries()[-1]
        if (last["result"], last["steps"]) != ("ok", _STEPS):
            return f"completed, but {last['result']} with {last['steps']} steps"
        sizes = {
            event.detail["active"]
            for file in self.job.folder.glob("hpcft-runs/*/events.jsonl")
            for event in log.read(file)
            if event.kind in ("start", "resume")
        }
        if sizes == {2} and last["params_sha256"] != undisturbed(2)[_STEPS]:
            return "completed with other parameters than an undisturbed run's"
        return ""

    def _failed(self) -> str:
        if "hpcft: " not in self.job.output:
            return "it has failed, and does not say why"
        checkpoints = self.job.folder / "checkpoints"
        if not list(checkpoints.glob("step-*")):
            return ""
        verify = [sys.executable, "-m", "hpcft.cli.main", "ckpt", "verify", str(checkpoints)]
        done = subprocess.run(verify, capture_output=True, text=True, check=False)
        return f"what it has saved is not good: {done.stdout}" if done.returncode else ""


def _is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"hpcft.world.rank" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _free(path: Path) -> int:
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


@contextlib.contextmanager
def mounted() -> Iterator[None]:
    """A file system at PLACE; nodes that come up later see it."""
    PLACE.mkdir(exist_ok=True)
    image = PLACE.with_suffix(".image")
    with image.open("wb") as file:
        file.truncate(_SIZE)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(PLACE)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(PLACE)], check=False)
        image.unlink()
        PLACE.rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="days (default 100)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--first", type=int, default=0, metavar="K", help="begin with day K")
    args = parser.parse_args()
    cluster = Cluster()
    if cluster.is_up():
        sys.exit("the lab is up, and would not see the file system made for this: take it down")
    wrong = 0
    os.environ["XDG_STATE_HOME"] = str(PLACE / "state")
    with mounted():
        cluster.up()
        try:
            for number in range(args.first, args.first + args.runs):
                wrong += not _one(cluster, args.seed, number)
        finally:
            cluster.down()
    print(f"{args.runs} days, {wrong} wrong (--seed {args.seed})")
    return 1 if wrong else 0


def _one(cluster: Cluster, seed: int, number: int) -> bool:
    """Whether a day ends well; says how."""
    deeds = draw(f"{seed}.{number}", cluster.nodes)
    day = Day(cluster, PLACE / f"day{number}")
    began = time.monotonic()
    try:
        problem = day.live(deeds)
    except AssertionError as error:
        problem = str(error)
    results = [summary["result"] for summary in day.job.summaries()]
    took = time.monotonic() - began
    said = [line for line in day.job.output.splitlines() if line.startswith("hpcft: ")]
    why = "" if results[-1:] == ["ok"] else f" ({said[-1] if said else 'no word'})"
    print(
        f"day {number}: {', '.join(map(str, deeds))}: {' '.join(results)}{why} "
        f"({took:.0f} s) {'WRONG: ' + problem if problem else 'right'}",
        flush=True,
    )
    if problem:
        print(day.job.story(), flush=True)
    cluster.run("scancel", day.job.number)
    cluster.revive()
    wait_for("the job to go", lambda: not cluster.run("squeue", "-h").stdout.strip())
    subprocess.run(["rm", "-rf", str(day.job.folder)], check=True)
    return not problem


if __name__ == "__main__":
    sys.exit(main())
