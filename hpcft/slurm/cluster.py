"""What a cluster offers: its partitions, their nodes and limits, and how srun starts MPI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpcft.slurm import scontrol
from hpcft.slurm.command import printed
from hpcft.slurm.scontrol import fields, seconds


@dataclass(frozen=True)
class Partition:
    """A partition, as far as a job has to fit into it.

    nodes: how many it has.
    most_nodes: a job may have; None for no limit.
    most_seconds: a job may run; None for no limit.
    preemptible: jobs of other partitions may take a job's nodes.
    cpus, gpus: of its smallest node.
    """

    name: str
    default: bool
    up: bool
    nodes: int
    most_nodes: int | None
    most_seconds: float | None
    preemptible: bool
    cpus: int
    gpus: int


def partitions() -> list[Partition]:
    """All of them; none where there is no Slurm."""
    nodes = printed("sinfo", "-h", "-e", "-o", "%R|%D|%c|%G")
    return read_partitions(scontrol.ask("--oneliner", "show", "partition"), nodes)


def read_partitions(shown: str, nodes: str) -> list[Partition]:
    """The same, of what ``scontrol show partition`` and ``sinfo -o '%R|%D|%c|%G'`` print."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for line in nodes.splitlines():
        name, _, cpus, gres = line.split("|")
        kinds.setdefault(name, []).append((int(cpus.rstrip("+")), _gpus(gres)))
    found = []
    for line in shown.splitlines():
        known = fields(line)
        if "PartitionName" not in known:
            continue
        name, most = known["PartitionName"], known.get("MaxNodes", "")
        mine = kinds.get(name, [(1, 0)])
        found.append(
            Partition(
                name,
                known.get("Default") == "YES",
                known.get("State") == "UP",
                int(known.get("TotalNodes", "0")),
                int(most) if most.isdigit() else None,
                seconds(known.get("MaxTime", "")),
                known.get("PreemptMode", "OFF") not in ("OFF", "GANG"),
                min(cpus for cpus, _ in mine),
                min(gpus for _, gpus in mine),
            )
        )
    return found


def _gpus(gres: str) -> int:
    """How many GPUs ``gpu:a100:4(S:0-1),other:1`` has."""
    return sum(int(n) for n in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))


def pmix() -> str | None:
    """What ``srun --mpi`` calls PMIx here; None if it has none."""
    return choose_pmix(printed("srun", "--mpi=list"))


def choose_pmix(listed: str) -> str | None:
    """The same, of what ``srun --mpi=list`` prints."""
    names = re.findall(r"\bpmix(?:_v\d+)?\b", listed)
    # Without a version it is the one that the site has chosen.
    return "pmix" if "pmix" in names else max(names, default=None)


def choose(name: str | None, there: Sequence[Partition]) -> Partition | None:
    """The partition of that name, or the default one."""
    return next((p for p in there if (p.default if name is None else p.name == name)), None)
