"""What a process group gives back for a call, in the form torch.distributed wants it in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch.futures import Future
from torch.utils import _pytree as pytree

from hpcft.train.host_memory import HostMemory
from hpcft.world.requests import all_done, wait_all


class Calls(Protocol):
    """Who makes calls of MPI, and knows whether one has failed."""

    @property
    def failure(self) -> BaseException | None: ...

    def calling(self) -> AbstractContextManager[None]: ...


def completed(result: Any) -> Future[Any]:
    """A future of a result that is there, or that the current streams are about to make."""
    leaves = pytree.tree_leaves(result)
    devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
    future: Future[Any] = Future(devices=[d for d in devices if d.type != "cpu"])
    future.set_result(result)
    return future


class Done(dist.Work):
    """A collective that is complete."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._result = result

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> Any:
        return self._result

    def get_future(self) -> Future[Any]:
        return completed(self._result)


class Pending(dist.Work):
    """A message on its way.

    Parameters
    ----------
    group: whose call it is; records a failure, as in a collective.
    requests: what MPI knows of it.
    memories: what is received into.
    """

    def __init__(
        self, group: Calls, requests: list[MPI.Request], memories: list[HostMemory]
    ) -> None:
        super().__init__()
        self._group = group
        self._requests = requests
        self._memories = memories

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._finish(lambda: wait_all(self._requests))
        return True

    def is_completed(self) -> bool:
        return not self._requests or self._finish(lambda: all_done(self._requests))

    def is_success(self) -> bool:
        return self.is_completed()

    def _finish(self, finish: Callable[[], bool]) -> bool:
        done = True
        if self._requests and self._group.failure is None:
            with self._group.calling():
                done = finish()
            if done and self._group.failure is None:
                for memory in self._memories:
                    memory.settle()
        if done:
            self._requests, self._memories = [], []
        return done
