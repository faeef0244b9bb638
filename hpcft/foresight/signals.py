"""Signs of trouble on this machine, now: what makes a failure likelier than the record says.

Each sign that is there multiplies the rate of its node by a factor. The factors are judgements of
the order of magnitude, not estimates: docs/foresight.md says what they lean on.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: More than that a machine's signs together do not raise its rate.
MOST = 30.0
_FACTORS = {"pressure": 3.0, "oom": 3.0, "kernel": 3.0, "ecc": 10.0, "xid": 10.0, "slurm": 10.0}
_FACTORS["late"] = 2.0
#: Per cent of the last five minutes in which all processes waited for memory.
_PRESSURE = 10.0
#: Xids of NVIDIA's driver that a program cannot cause by itself.
_HARD_XIDS = {48, 63, 64, 74, 79, 92, 94, 95, 119, 120}
_SECONDS = 20.0
_MOST_LOG = 4 << 20


@dataclass(frozen=True)
class Sign:
    """Something that was looked at.

    name: what, in short.
    node: where.
    there: whether it is a sign of trouble; None if it could not be looked at.
    said: what was found, in words.
    """

    name: str
    node: str
    there: bool | None
    said: str

    @property
    def factor(self) -> float:
        """By which it raises the rate of its node."""
        return _FACTORS[self.name] if self.there else 1.0


def factors(signs: Sequence[Sign]) -> dict[str, float]:
    """Of each node with a sign of trouble, by how much they raise its rate together."""
    found: dict[str, float] = {}
    for sign in signs:
        if sign.there:
            found[sign.node] = min(MOST, found.get(sign.node, 1.0) * sign.factor)
    return found


def here(node: str, kills: int) -> list[Sign]:
    """All of this machine.

    Parameters
    ----------
    kills: processes that the kernel has killed for memory in this control group.
    """
    return [
        pressure(node, _text(Path("/proc/pressure/memory"))),
        Sign("oom", node, kills > 0, f"{kills} processes killed for memory in this control group"),
        *kernel(node, _kernel_log()),
        ecc(node, _printed("nvidia-smi", *_ECC)),
    ]


_ECC = (
    "--query-gpu=index,ecc.errors.uncorrected.volatile.total",
    "--format=csv,noheader,nounits",
)


def pressure(node: str, text: str | None) -> Sign:
    """By what the kernel says of memory in ``/proc/pressure/memory``."""
    found = re.search(r"^full .*\bavg300=([\d.]+)", text or "", re.MULTILINE)
    if not found:
        return Sign("pressure", node, None, "the kernel keeps no record of memory pressure")
    share = float(found[1])
    said = f"in the last five minutes all processes waited for memory {share:g} % of the time"
    return Sign("pressure", node, share > _PRESSURE, said)


def kernel(node: str, log: str | None) -> list[Sign]:
    """By the lines of the kernel's log."""
    if log is None:
        unread = "the kernel's log cannot be read (it may need root)"
        return [Sign("kernel", node, None, unread), Sign("xid", node, None, unread)]
    # A limit of a control group is a limit, and not a lack of memory of the machine.
    kills = len(re.findall(r"Out of memory: Kill", log))
    limited = len(re.findall(r"Memory cgroup out of memory: Kill", log))
    xids = [int(xid) for xid in re.findall(r"NVRM: Xid \([^)]*\): (\d+)", log)]
    hard = sorted({xid for xid in xids if xid in _HARD_XIDS})
    said = f"{len(xids)} Xids in the kernel's log"
    return [
        Sign(
            "kernel",
            node,
            kills > 0,
            f"the kernel's log has {kills} kills for want of memory, and {limited} at the limit "
            "of a control group",
        ),
        Sign("xid", node, bool(hard), said + (f", of hardware: {hard}" if hard else "")),
    ]


def ecc(node: str, text: str | None) -> Sign:
    """By what nvidia-smi says of uncorrected errors of each GPU since the driver was loaded."""
    if not text:
        return Sign("ecc", node, None, "no GPU that nvidia-smi knows")
    counts = [row.split(",")[1].strip() for row in text.splitlines() if "," in row]
    known = [int(count) for count in counts if count.isdigit()]
    if not known:
        return Sign("ecc", node, None, "the GPUs do not count memory errors")
    return Sign("ecc", node, sum(known) > 0, f"{sum(known)} uncorrected memory errors of GPUs")


def late(node: str, seconds: float, patience: float = 10.0) -> Sign:
    """By how long ago a run that trains has renewed its status, which it does every second."""
    said = f"its run's status was renewed {max(0.0, seconds):.0f} s ago, and is due every second"
    return Sign("late", node, seconds > patience, said)


def _kernel_log() -> str | None:
    """What is in the kernel's ring buffer."""
    found = []
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return _printed("dmesg")
    try:
        size = 0
        while size < _MOST_LOG:
            try:
                found.append(os.read(fd, 8192))
            except BrokenPipeError:
                continue  # what was to be read next was overwritten
            except BlockingIOError:
                break
            size += len(found[-1])
    except OSError:
        return None
    finally:
        os.close(fd)
    return b"".join(found).decode(errors="replace")


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _printed(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
