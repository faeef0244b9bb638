"""Amounts in words, as the report says them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Of a run or a part of it: ``2 h 5 min``, ``14.2 s``, ``35 ms``.

    Below zero it is nothing: clocks of nodes differ.
    """
    if seconds <= 0:
        return "0 s"
    if seconds >= 172800:
        return f"{seconds // 86400:.0f} d {seconds % 86400 // 3600:.0f} h"
    if seconds >= 7200:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"
    if seconds >= 120:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return short(seconds)


def short(seconds: float) -> str:
    """Of a step or a recovery, to three digits."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            number = seconds * factor
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    raise AssertionError("the last unit is for everything")


def percent(part: float) -> str:
    """``42 %``; of little, one more digit; what is more than nothing is never 0 %."""
    number = 100 * part
    if 0 < number < 0.05:
        return "< 0.1 %"
    return f"{number:.1f} %" if 0 < number < 10 or 99 < number < 100 else f"{number:.0f} %"


def count(number: int, noun: str) -> str:
    """``1 rank``, ``3 ranks``."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith(('ss', 'ch')) else 's'}"


def listed(words: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
