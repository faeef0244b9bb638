"""What the user wants of checkpoints: where they go, how often, which are kept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcft.ckpt.filesystem import Choice
from hpcft.ckpt.near import Tier
from hpcft.ckpt.store import Checkpoint
from hpcft.errors import UsageError

#: How to say which are the best, for those who are asked to.
BEST = (
    "the best by a metric that the script gives to state.commit(): loss means the one with the "
    "least loss, accuracy:max:2 the two with the most accuracy; validation/loss is that which a "
    "spare has found (--spares-do evaluate)"
)


@dataclass(frozen=True)
class Best:
    """Keep also the best checkpoints.

    metric: one that the script gives to ``state.commit()``, or ``validation/`` and one that its
        ``evaluate`` returns.
    most: whether more of it is better.
    count: how many.
    """

    metric: str
    most: bool
    count: int

    @classmethod
    def parse(cls, text: str) -> Best:
        """``loss``, ``accuracy:max``, ``accuracy:max:2``: what :data:`BEST` explains.

        Raises
        ------
        UsageError: it is nothing like that.
        """
        found = re.fullmatch(r"([^:]+)(:min|:max)?(?::([1-9]\d{0,5}))?", text)
        if not found:
            raise UsageError(
                f"{text!r} names no metric", "give something like loss or accuracy:max:2"
            )
        return cls(found[1], found[2] == ":max", int(found[3] or 1))

    def of(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The best of them, of equal ones the later."""

        def worth(checkpoint: Checkpoint) -> float:
            value = checkpoint.metrics.get(self.metric, math.nan)
            return value if self.most else -value

        known = [c for c in checkpoints if not math.isnan(worth(c))]
        return sorted(known, key=lambda c: (worth(c), c), reverse=True)[: self.count]


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept.

    newest: so many of the newest, at least 1.
    nth: also all whose step is a multiple of this; 0 for none.
    best: also the best by a metric.
    """

    newest: int
    nth: int = 0
    best: Best | None = None

    def surplus(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """Those of all ``checkpoints`` that nobody wants any more, oldest first."""
        kept = set(sorted(checkpoints)[-self.newest :])
        if self.nth:
            kept |= {c for c in checkpoints if c.step % self.nth == 0}
        if self.best:
            kept |= set(self.best.of(checkpoints))
        return sorted(set(checkpoints) - kept)


@dataclass(frozen=True)
class Policy:
    """What the user wants.

    directory: where checkpoints go.
    every: steps, or seconds if ``timed``, between them.
    longest: that is so at first, and then what costs least, up to so many seconds; None: always.
    retention: which are kept.
    memory: bytes of staging memory a rank.
    bandwidth: bytes a second a rank writes at most; 0 is no limit.
    overlap: copy the state while the next step's forward and backward pass run.
    timeout: seconds to wait for a file system that gets nothing done.
    layout: of the files; ``auto`` by their file system.
    near: checkpoints near the ranks besides.
    """

    directory: str
    every: float
    timed: bool
    retention: Retention
    memory: int
    bandwidth: int
    overlap: bool
    timeout: float
    layout: Choice = "auto"
    near: tuple[Tier, ...] = ()
    longest: float | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Policy:
        """The inverse of :func:`dataclasses.asdict`."""
        retention = dict(plain["retention"])
        retention["best"] = retention["best"] and Best(**retention["best"])
        near = tuple(Tier(**tier) for tier in plain["near"])
        return cls(**{**plain, "retention": Retention(**retention), "near": near})
