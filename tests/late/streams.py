"""Saves and restores a tensor on the device ``late`` while its streams are behind.

``streams.py FOLDER [WAIT]``: without a wait of the ferries' (``follow``, ``lead``, ``follow_all``,
``mark``) what comes back is wrong. Exits with 1 if it is.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import late
import torch

from hpcft.ckpt import device
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Store

MIB = 1 << 20
#: Milliseconds: of the training's work, and of a chunk's copy.
BEHIND, COPY = 200, 5


def trial(folder: Path, pool: int) -> bool:
    late.set_delay(0)
    tensor, two, zero = (torch.full((MIB,), value).to("late") for value in (1.0, 2.0, 0.0))
    engine, store = Engine(pool, chunk=MIB // 8), Store(folder).create()
    saver = Saver(store, Alone(), engine)
    late.set_delay(BEHIND)
    tensor.copy_(two)
    late.set_delay(COPY)
    saving = saver.begin(1, {"model": {"tensor": tensor}})
    saving.wait_copied(in_order=True)
    tensor.copy_(zero)
    saving.wait_copied()
    while not saving.advance():
        time.sleep(0.001)
    saving.finish()
    torch.accelerator.synchronize()

    # Another thread's stream, as the one that has built the model.
    late.set_delay(BEHIND)
    with torch.Stream(device="late"):
        tensor.copy_(zero)
    late.set_delay(COPY)
    load(store.committed()[-1].state, engine, target=lambda keys, spec: tensor)
    torch.accelerator.synchronize()
    return bool((tensor.cpu() == 2).all()) and engine.peak <= pool


def main() -> int:
    folder, *without = sys.argv[1:]
    for wait in without:
        setattr(device._Lane, wait, lambda self: None)
    pools = (MIB // 2, 64 * MIB)
    return 0 if all(trial(Path(folder) / str(pool), pool) for pool in pools) else 1


if __name__ == "__main__":
    sys.exit(main())
