"""Python's garbage collector, kept from looking where there is nothing to find.

To plan and describe ten thousand leaves makes several times as many objects, all of which live on.
At such growth the collector goes through everything that the process has, again and again: with
torch loaded that takes longer than the work itself.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Around work whose objects live on, or as its decorator; in all threads of the process."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
