"""Nodes as Slurm's controller has them."""

from __future__ import annotations

from collections.abc import Collection

from hpcft.slurm import scontrol


def draining(hosts: Collection[str]) -> set[str]:
    """Those that are to take no other jobs, by somebody's wish; none if Slurm does not say."""
    records = scontrol.ask("--oneliner", "show", "node", ",".join(sorted(hosts))).splitlines()
    known = (scontrol.fields(record) for record in records)
    return {node["NodeName"] for node in known if "DRAIN" in node.get("State", "")}
