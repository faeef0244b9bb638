"""The kind of accelerator this process uses."""

from __future__ import annotations

from typing import Any

import torch


def in_use() -> Any | None:
    """Torch's module for it (``torch.cuda``, ``torch.xpu``), once something has used it.

    To ask more of it before would make a context on it, in memory that the script may want.
    """
    found = torch.accelerator.current_accelerator()
    if found is None:
        return None
    module = torch.get_device_module(found)
    # That of Apple's has no such state, and no business here.
    initialized = getattr(module, "is_initialized", None)
    return module if initialized and initialized() else None
