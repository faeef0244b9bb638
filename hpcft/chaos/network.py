"""Faults of links: cut, or lossy, between this host and the run's others; needs root and ``tc``."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from hpcft.chaos.faults import Fault, Refused, Task
from hpcft.errors import HpcftError

#: What the kernel puts there by itself, and again when ours is gone.
_USUAL = frozenset(("noqueue", "fq_codel", "pfifo_fast", "mq", "fq", "pfifo"))
#: Of our qdisc, by which it is known to be ours.
_HANDLE = "c4a0:"
_BAND = "c4a0:4"
_TIME = 10.0


class Lossy(Fault):
    """What this host sends to the run's other hosts is lost in part; others' traffic is not."""

    def prepare(self, task: Task) -> dict[str, Any]:
        if not task.peers:
            raise Refused("the run is on one host, and its messages cross no link")
        if shutil.which("tc") is None or shutil.which("ip") is None:
            raise Refused("there is no tc here, which loses packets", "install iproute2")
        by_device: dict[str, list[str]] = {}
        for address in task.peers:
            by_device.setdefault(_device(address), []).append(address)
        for device in by_device:
            kinds = {str(one["kind"]) for one in _asked("tc", "-j", "qdisc", "show", "dev", device)}
            if strange := kinds - _USUAL:
                raise Refused(
                    f"{device} has a queueing discipline already: {', '.join(sorted(strange))}",
                    "it would not be there any more afterwards",
                )
        return {"devices": by_device, "percent": self.percent(task)}

    def percent(self, task: Task) -> float:
        """Of the packets, that are lost."""
        return task.amount

    def do(self, how: dict[str, Any]) -> None:
        for device, addresses in how["devices"].items():
            qdisc = ("tc", "qdisc", "add", "dev", device)
            # All as ever, in three bands by the packets' priority; only what is filtered out of
            # that goes to a fourth.
            _call(*qdisc, "root", "handle", _HANDLE, "prio", "bands", "4")
            _call(*qdisc, "parent", _BAND, "netem", "loss", f"{how['percent']:g}%")
            for address in addresses:
                family, word = ("ipv6", "ip6") if ":" in address else ("ip", "ip")
                _call(
                    *("tc", "filter", "add", "dev", device, "parent", _HANDLE, "protocol", family),
                    *("u32", "match", word, "dst", address, "flowid", _BAND),
                )

    def undo(self, how: dict[str, Any]) -> None:
        for device in how["devices"]:
            found = _asked("tc", "-j", "qdisc", "show", "dev", device)
            if any(one.get("handle") == _HANDLE for one in found):
                _call("tc", "qdisc", "del", "dev", device, "root")


class Cut(Lossy):
    """Nothing of what this host sends to the run's others gets there, acknowledgements neither."""

    def percent(self, task: Task) -> float:
        return 100.0


def _device(address: str) -> str:
    routes = _asked("ip", "-j", "route", "get", address)
    return str(routes[0]["dev"])


def _asked(*command: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(_call(*command) or "[]")
    except ValueError as error:
        raise Refused(f"{' '.join(command)} gives no answer that can be read") from error
    return found


def _call(*command: str) -> str:
    """What a command prints.

    Raises
    ------
    HpcftError: it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIME, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HpcftError(f"{' '.join(command)} fails: {error}") from error
    if done.returncode:
        raise HpcftError(f"{_shown(command)}: {done.stderr.strip()}", "links need root (NET_ADMIN)")
    return done.stdout


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)
