"""What is known of the runs that have saved to a directory: how long, and what they needed.

A run with ``--ckpt-every auto`` goes by it, and so does the one that takes up its training after a
requeue, perhaps on other nodes. It is the file ``.history.json`` beside the checkpoints; rank 0 has
it, as it has the directory's lock.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_NAME = ".history.json"


@dataclass(frozen=True)
class Habit:
    """Of one tier, when it was last looked at; all in seconds.

    cost: what a save costs training.
    drain: what it takes from begin to end.
    every: from one to the next.
    """

    cost: float
    drain: float
    every: float


@dataclass
class History:
    """What has been so far.

    node_seconds: seconds trained, times nodes.
    restores: how often a failure has needed a tier, by its name.
    habits: by the tiers' names.
    running: a run trains, or has ended without having saved its last step.
    """

    node_seconds: float = 0.0
    restores: dict[str, int] = field(default_factory=dict)
    habits: dict[str, Habit] = field(default_factory=dict)
    running: bool = False

    @classmethod
    def read(cls, directory: Path) -> History:
        """That of a directory; an empty one if there is none, or it is damaged.

        Raises
        ------
        OSError: it cannot be read.
        """
        try:
            plain = json.loads((directory / _NAME).read_bytes())
            return cls._of(plain)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError, LookupError):
            return cls()

    @classmethod
    def _of(cls, plain: dict[str, Any]) -> History:
        node_seconds = _amount(plain["node_seconds"])
        restores = {str(tier): int(_amount(n)) for tier, n in plain["restores"].items()}
        habits = {
            str(tier): Habit(*(_amount(habit[name]) for name in ("cost", "drain", "every")))
            for tier, habit in plain["habits"].items()
        }
        return cls(node_seconds, restores, habits, bool(plain["running"]))

    def write(self, directory: Path) -> None:
        """Make this the directory's.

        Raises
        ------
        OSError: it cannot be written.
        """
        aside = directory / f"{_NAME}.new"
        aside.write_text(json.dumps(asdict(self)))
        aside.replace(directory / _NAME)

    def restored(self, tier: str) -> None:
        """Training goes on from a checkpoint of a tier: a failure, unless it had ended in order."""
        if self.running:
            self.restores = {**self.restores, tier: self.restores.get(tier, 0) + 1}
        self.running = False


def _amount(value: Any) -> float:
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{value} is no amount")
    return number
