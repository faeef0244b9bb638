"""Runs a program as if all its tensors were on a device whose memory nobody but torch can reach.

``elsewhere.py PROGRAM ARGS...``: so everything travels as a GPU's tensors do: through the chunks
that the engine lends, and through staging memory between ranks. Only streams there are none.
"""

from __future__ import annotations

import runpy
import sys

from hpcft.ckpt import device

device.is_elsewhere = lambda tensor: tensor.device.type != "meta"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
