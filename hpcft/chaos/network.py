"""Faults of links: cut, or lossy, between this host and the run's others; both need root."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from hpcft.chaos.faults import Fault, Refused, Task
from hpcft.errors import HpcftError

_TIME = 10.0
_NO_LINK = "the run is on one host, and its messages cross no link"
#: Of so many packets a whole number is lost.
_OF = 100_000


class Lossy(Fault):
    """Of what comes in from the run's other hosts a part is lost; others' traffic is not.

    For TCP that is as if it was lost on its way, be it data or what acknowledges data.
    """

    def prepare(self, task: Task) -> dict[str, Any]:
        if not task.peers:
            raise Refused(_NO_LINK)
        if shutil.which("nft") is None:
            raise Refused("there is no nft here, which drops packets", "install nftables")
        _tables()
        table = f"hpcft_chaos_{secrets.token_hex(4)}"
        return {"table": table, "peers": list(task.peers), "percent": task.amount}

    def do(self, how: dict[str, Any]) -> None:
        lost = f"numgen random mod {_OF} < {round(how['percent'] / 100 * _OF)} drop"
        lines = [
            f"table inet {how['table']} {{",
            "chain incoming {",
            "type filter hook prerouting priority raw",
            *(f"{'ip6' if ':' in peer else 'ip'} saddr {peer} {lost}" for peer in how["peers"]),
            "}",
            "}",
        ]
        _call("nft", "-f", "-", told="".join(f"{line}\n" for line in lines))

    def undo(self, how: dict[str, Any]) -> None:
        if how["table"] in _tables():
            _call("nft", "delete", "table", "inet", how["table"])


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


def _tables() -> set[str]:
    """Those of this host."""
    said = json.loads(_call("nft", "-j", "list", "tables"))
    return {str(one["table"]["name"]) for one in said["nftables"] if "table" in one}


def _asked(*command: str) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(_call(*command) or "[]")
    except ValueError as error:
        raise Refused(f"{' '.join(command)} gives no answer that can be read") from error
    return found


def _call(*command: str, told: str = "") -> str:
    """What a command prints.

    Parameters
    ----------
    told: its input.

    Raises
    ------
    HpcftError: it fails.
    """
    try:
        done = subprocess.run(
            command, input=told, capture_output=True, text=True, timeout=_TIME, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HpcftError(f"{' '.join(command)} fails: {error}") from error
    if done.returncode:
        raise HpcftError(f"{_shown(command)}: {done.stderr.strip()}", "links need root (NET_ADMIN)")
    return done.stdout


def _shown(command: Sequence[str]) -> str:
    return " ".join(command)
