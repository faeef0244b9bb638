"""Nodes as Slurm's controller has them."""

from __future__ import annotations

from collections.abc import Collection

from hpcft.slurm import scontrol
from hpcft.slurm.command import printed

#: States, as sinfo has them, of nodes that can run jobs, at once or later.
_USABLE = ("idle", "allocated", "mixed", "completing", "reserved", "planned")


def draining(hosts: Collection[str]) -> set[str]:
    """Those that are to take no other jobs, by somebody's wish; none if Slurm does not say."""
    records = scontrol.ask("--oneliner", "show", "node", ",".join(sorted(hosts))).splitlines()
    known = (scontrol.fields(record) for record in records)
    return {node["NodeName"] for node in known if "DRAIN" in node.get("State", "")}


def usable(partition: str) -> dict[str, bool]:
    """The nodes of a partition, and whether they run jobs or could; none if Slurm does not say."""
    where = f"--partition={partition}"
    lines = printed("sinfo", "--noheader", "--Node", where, "--format=%N %T").splitlines()
    states = (line.split() for line in lines)
    # With a mark of what else there is to say of it, such as * for one that does not answer.
    return {state[0]: state[1] in _USABLE for state in states if len(state) == 2}
