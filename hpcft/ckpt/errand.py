"""Calls to a file system, which may never return.

A file system that has lost its servers answers late or never, and the kernel lets nobody interrupt
such a call. So training sends a thread and waits for it only so long.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

#: Seconds between two looks of who must not wait in a thread.
_LOOK = 0.05


class Errand(Generic[T]):
    """A call in a thread of its own; it begins at once.

    Parameters
    ----------
    call: what to call. Nobody waits for it at the end of the process.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="hpcft-errand", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._call()
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether the call has ended."""
        return not self._thread.is_alive()

    async def answered(self, seconds: float = math.inf) -> bool:
        """Wait for the call's end, or so many seconds; whether it has ended."""
        deadline = time.monotonic() + seconds
        while not self.done and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)
        return self.done

    def result(self, timeout: float | None = None) -> T:
        """What the call has returned, or raised.

        Parameters
        ----------
        timeout: seconds to wait for its end; None waits for ever, but so that the waiting thread
            can be interrupted and killed.

        Raises
        ------
        TimeoutError: it has not ended.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the file system has not answered for {timeout:g} s")
        if self._error:
            raise self._error
        return self._found
