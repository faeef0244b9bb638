"""Times and ranges as they are written on the command line."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

_UNITS = {
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
    "d": 86400.0,
    "w": 7 * 86400.0,
    "y": 365.25 * 86400.0,
}
#: Values that a range is taken at, if it has more.
_POINTS = 17


def seconds(text: str) -> float:
    """``90``, ``90s``, ``10m``, ``1.5h``, ``3d``, ``50y``; ``never`` is infinite."""
    if text == "never":
        return math.inf
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in {"", *_UNITS}:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; write 90s, 10m, 1.5h, 3d, 50y, or never"
        )
    return float(found[1]) * _UNITS[found[2] or "s"]


def values(text: str, read: Callable[[str], float], whole: bool) -> list[float]:
    """``a,b,c``, or ``a..b``: whole numbers evenly, times and rates by even ratios.

    Raises
    ------
    ValueError, argparse.ArgumentTypeError: it is neither.
    """
    first, dots, last = text.partition("..")
    if not dots:
        return [read(one) for one in text.split(",")]
    low, high = read(first), read(last)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("a range goes from a smaller to a greater value")
    if whole:
        count = min(_POINTS, int(high - low) + 1)
        found = [round(low + (high - low) * n / (count - 1)) for n in range(count)]
        return [float(one) for one in dict.fromkeys(found)]
    if low <= 0:
        raise ValueError("a range of times begins above 0")
    return [low * (high / low) ** (n / 8) for n in range(9)]
