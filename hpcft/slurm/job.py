"""The job a run is in: whether Slurm can start it again, how long it leaves it at its end."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from hpcft.slurm import nodes, queue, scontrol
from hpcft.slurm.scontrol import fields, seconds

#: Begins the comments that are ours to replace.
_MARK = "hpcft: "


@dataclass(frozen=True)
class Grace:
    """How long Slurm leaves a job that is to end.

    seconds: from the first signal until it is killed.
    what: ends it, in words.
    remedy: how to get more.
    """

    seconds: float
    what: str
    remedy: str


@dataclass(frozen=True)
class Job:
    """A job as the controller has it.

    number: its id; of a task of an array the array's and the task's, for the other alone may mean
        all tasks.
    state: such as RUNNING.
    reason: for its state, such as TimeLimit.
    restarts: how often it was requeued.
    batch: it has a script, which Slurm could run again.
    batch_host: the node on which that runs; empty if there is none.
    requeueable: the user and the site let it be requeued.
    partition: where it runs.
    comment: what its user, or an earlier run, has written down.
    """

    number: str
    state: str
    reason: str
    restarts: int
    batch: bool
    batch_host: str
    requeueable: bool
    partition: str
    comment: str

    @property
    def problem(self) -> str:
        """Why it cannot be requeued, with a remedy; empty if it can."""
        if not self.batch:
            return "only batch jobs are requeued; submit it with sbatch"
        if not self.requeueable:
            return "the job is not to be requeued; submit it with sbatch --requeue"
        return ""

    def graces(self) -> list[Grace]:
        """The ends that Slurm may make of the job, and the time it leaves for each."""
        script = scontrol.ask("write", "batch_script", self.number, "-") if self.batch else ""
        partition = fields(
            scontrol.ask("--oneliner", "show", "partition", self.partition).partition("\n")[0]
        )
        return read_graces(script, partition, scontrol.configuration())

    def requeue(self) -> None:
        """Have Slurm end the job and start it again; by its own user.

        Raises
        ------
        Refused: that is not to be.
        """
        scontrol.tell("requeue", self.number)

    def exclude(self, hosts: Collection[str], wanted: int) -> list[str]:
        """Have the job, which waits, not run on these nodes, besides where it does not run anyway.

        Parameters
        ----------
        wanted: how many nodes it needs. (Of one that has lost some the controller has fewer, but
            starts it again on as many as before.)

        Returns
        -------
        Those it does not run on: fewer than were named if too few others would be left for it, for
        then it would wait for ever.

        Raises
        ------
        Refused: that is not to be.
        """
        shown = fields(scontrol.ask("--oneliner", "show", "job", self.number).partition("\n")[0])
        before = shown.get("ExcNodeList", "(null)")
        listed = "" if before == "(null)" else before
        already = set(queue.expand(listed))
        usable = {
            node: could
            for node, could in nodes.usable(self.partition).items()
            if node not in already
        }
        spared = spare(usable, hosts, wanted)
        if spared:
            names = ",".join(filter(None, (listed, *spared)))
            scontrol.tell("update", f"JobId={self.number}", f"ExcNodeList={names}")
        return spared

    def note(self, text: str) -> None:
        """Write a line about the job into its record, for ``sacct`` and ``scontrol show job``.

        What somebody else has written there is left alone.

        Raises
        ------
        Refused: that is not to be.
        """
        if not self.comment or self.comment.startswith(_MARK):
            scontrol.tell("update", f"JobId={self.number}", f"Comment={_MARK}{text}")


def spare(usable: Mapping[str, bool], bad: Collection[str], wanted: int) -> list[str]:
    """Which of some bad nodes a job can do without.

    Parameters
    ----------
    usable: all nodes that it may have, and whether they could run it now; none if Slurm does not
        say.
    wanted: how many it needs.
    """
    if not usable:
        return sorted(bad)
    now = {node for node, could in usable.items() if could}
    # It is to wait for none if it need not, and so may have of those that are well what it needs.
    spared = sorted(now & set(bad))[: max(len(now) - wanted, 0)]
    # Others may come back, and be needed then.
    others = sorted(set(bad) & usable.keys() - now)
    return sorted([*spared, *others[: max(len(usable) - wanted - len(spared), 0)]])


def find_job(number: str) -> Job | None:
    """The job of this number; None if the controller does not say."""
    return parse(number, scontrol.ask("--oneliner", "show", "job", number))


def parse(number: str, records: str) -> Job | None:
    """A job, of what ``scontrol --oneliner show job`` prints; None if it is not there."""
    # An array's number is that of one of its tasks, too, and shows them all.
    jobs = [fields(record) for record in records.splitlines()]
    known = next((job for job in jobs if job.get("JobId") == number), None)
    if known is None:
        return None
    comment = known.get("Comment", "")
    task = known.get("ArrayTaskId")
    return Job(
        f"{known['ArrayJobId']}_{task}" if task else number,
        known.get("JobState", ""),
        known.get("Reason", ""),
        int(known.get("Restarts", "0")),
        known.get("BatchFlag") == "1",
        known.get("BatchHost", ""),
        known.get("Requeue") == "1",
        known.get("Partition", ""),
        "" if comment == "(null)" else comment,
    )


def read_graces(script: str, partition: dict[str, str], config: dict[str, str]) -> list[Grace]:
    """These ends, of a batch script and what ``scontrol show partition`` and ``config`` print.

    What ``--signal`` a job was submitted with the controller tells only in the script.
    """
    kill = seconds(config.get("KillWait", "")) or 30.0
    found = re.search(r"^#SBATCH\s+--signal[= ]\S*@(\d+)", script, re.MULTILINE)
    # Without a time it is a minute.
    plain = re.search(r"^#SBATCH\s+--signal[= ]", script, re.MULTILINE)
    warned = float(found[1]) if found else 60.0 if plain else 0.0
    limits = [
        Grace(
            warned + kill if warned else kill,
            "the time limit",
            "have Slurm warn earlier, as in sbatch --signal=USR1@600",
        )
    ]
    if partition.get("PreemptMode", "OFF").upper() not in ("OFF", "SUSPEND", "GANG,SUSPEND"):
        grace = seconds(partition.get("GraceTime", "")) or 0.0
        limits.append(
            Grace(grace + kill, "preemption", "save more often (--ckpt-every, --ckpt-near)")
        )
    return limits
