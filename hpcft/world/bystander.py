"""A process that runs the script, or something else, beside the ranks, and is none of them.

It has a link to a shepherd but no place in MPI, which it never starts. What it does, and what it
ends by, is no concern of the ranks': it can be killed at any moment.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcft.world.link import Link

#: Only what others leave of the processors.
_NICENESS = 19


@dataclass(frozen=True)
class Bystander:
    """This process, if it is one.

    link: to the shepherd that has had it started.
    size: how many ranks trained then.
    options: as of :class:`hpcft.world.session.Session`, with ``bystander``: how many ranks train,
        and what it runs in place of the script.
    """

    link: Link
    size: int
    options: dict[str, Any]


_present: Bystander | None = None


def stand(link: Link, options: dict[str, Any]) -> None:
    """Be one."""
    global _present
    os.nice(_NICENESS)
    # Where memory runs short it is this process that ends, and no rank.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    _present = Bystander(link, options["bystander"]["ranks"], options)


def present() -> Bystander | None:
    """What this process is as a bystander; None in a rank."""
    return _present
