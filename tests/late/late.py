"""Makes torch know the device ``late`` (late.cpp), which is then the accelerator of this process.

``late.py PROGRAM ARGS...`` runs a program in a process that knows it.
"""

from __future__ import annotations

import os
import runpy
import sys
import types
from functools import partial
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

torch.utils.rename_privateuse1_backend("late")
# Built once; the processes of a run wait for each other.
_device = load("late_device", [str(Path(__file__).with_name("late.cpp"))], extra_cflags=["-O1"])

#: Sets for how many milliseconds the copies asked for from now on are under way.
set_delay = _device.set_delay


class _Late(types.ModuleType):
    """What torch expects of ``torch.late``. Its random numbers are the host's."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


torch._register_device_module("late", _Late("torch.late"))

if __name__ == "__main__":
    set_delay(int(os.environ.get("LATE_MS", "0")))
    # Torch takes it for one that has kernels of its own for many tensors at once.
    torch.optim.Adam = partial(torch.optim.Adam, foreach=False)  # type: ignore[misc]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
