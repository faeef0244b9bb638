"""A picture in the terminal that is renewed until somebody has seen enough."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live

from hpcft.errors import UsageError


def check_period(seconds: float) -> None:
    """See that ``--every`` is one.

    Raises
    ------
    UsageError: it is not.
    """
    # So written that nan is refused as well.
    if not 0.05 <= seconds < 1e6:
        raise UsageError(f"--every {seconds} makes no sense", "give 0.05 seconds or more")


def keep_showing(picture: Callable[[], RenderableType], every: float) -> None:
    """Show what ``picture`` returns, again every so many seconds, until the key q, or Ctrl-C."""
    plain = Console(markup=False, highlight=False)
    with _keys() as pressed, Live(picture(), console=plain, auto_refresh=False) as live:
        try:
            while "q" not in pressed(every).lower():
                live.update(picture(), refresh=True)
        except KeyboardInterrupt:  # the other way to end it
            pass


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Gives what waits for keys, so many seconds, and returns those pressed."""
    if not sys.stdin.isatty():

        def wait(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield wait
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def read(seconds: float) -> str:
        if not select.select([fd], [], [], seconds)[0]:
            return ""
        if not (keys := os.read(fd, 64)):
            return "q"  # nobody is at the terminal any more
        return keys.decode(errors="replace")

    try:
        tty.setcbreak(fd)
        yield read
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
