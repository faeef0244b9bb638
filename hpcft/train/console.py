"""The progress line of a training, shown by logical rank 0."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Step, metrics and steps per second, rewritten in place on a terminal.

    Parameters
    ----------
    terminal: whether the run is watched at a terminal; otherwise a line is printed now and then.
    """

    def __init__(self, terminal: bool) -> None:
        self._terminal = terminal
        self._every = 0.2 if terminal else 10.0
        self._shown = time.monotonic()
        self._shown_step = 0
        self._pending = False

    def begin(self, step: int) -> None:
        """Training begins at ``step``, or goes on there."""
        self._shown, self._shown_step = time.monotonic(), step

    def step(self, step: int, size: int, metrics: dict[str, float]) -> None:
        """A step is completed. Shows it unless the last was shown a moment ago."""
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        rate = (step - self._shown_step) / (now - self._shown)
        values = "".join(f"  {name} {value:.4g}" for name, value in metrics.items())
        text = f"step {step}  {size} ranks  {rate:.1f} steps/s{values}"
        sys.stderr.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        sys.stderr.flush()
        self._shown, self._shown_step, self._pending = now, step, self._terminal

    def say(self, text: str) -> None:
        """A line that stays."""
        sys.stderr.write(f"\r\x1b[K{text}\n" if self._pending else f"{text}\n")
        sys.stderr.flush()
        self._pending = False
