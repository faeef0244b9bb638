"""A dataset that takes its time, as from a slow file system: BENCHMARK_LOAD says how long."""

from __future__ import annotations

import os
import time

import numpy as np

time.sleep(float(os.environ["BENCHMARK_LOAD"]))
DATA = np.ones(1 << 22, np.float32)
