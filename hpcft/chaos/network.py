"""Faults of links: cut, or lossy, between this host and the run's others; both need root."""

from __future__ import annotations

import json
import os
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
_NO_LINK = "the run is on one host, and its messages cross no link"


class Lossy(Fault):
    """What this host sends to the run's other hosts is lost in part; others' traffic is not."""

    def prepare(self, task: Task) -> dict[str, Any]:
        if not task.peers:
            raise Refused(_NO_LINK)
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
        return {"devices": by_device, "percent": task.amount}

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


class Cut(Fault):
    """Nothing of what this host sends to the run's others leaves it, acknowledgements neither."""

    def prepare(self, task: Task) -> dict[str, Any]:
        if not task.peers:
            raise Refused(_NO_LINK)
        if shutil.which("ip") is None:
            raise Refused("there is no ip here, which sets routes", "install iproute2")
        if os.geteuid():
            raise Refused("only root may cut a link")
        if there := [peer for peer in task.peers if _holes(peer)]:
            raise Refused(f"what is sent to {', '.join(there)} is dropped already")
        return {"peers": list(task.peers)}

    def do(self, how: dict[str, Any]) -> None:
        for peer in how["peers"]:
            # More exact than any other route to it, which stay as they are.
            _call("ip", _family(peer), "route", "add", "blackhole", peer)

    def undo(self, how: dict[str, Any]) -> None:
        for peer in how["peers"]:
            if _holes(peer):
                _call("ip", _family(peer), "route", "del", "blackhole", peer)


def _holes(peer: str) -> list[dict[str, Any]]:
    """The routes by which what is sent to a host is dropped."""
    return _asked("ip", "-j", _family(peer), "route", "show", "type", "blackhole", "exact", peer)


def _family(address: str) -> str:
    return "-6" if ":" in address else "-4"


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
