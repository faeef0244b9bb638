"""How often Python looks for garbage while a script starts.

Importing torch makes a million objects that stay. Looking through them again and again, as Python
does by default, is a sixth of the time that a script takes to start.
"""

from __future__ import annotations

import gc

#: New objects between two searches; some MB of them, should they be garbage.
_SELDOM = 100_000

_usual: tuple[int, int, int] | None = None


def seldom() -> None:
    """Search seldom from now on."""
    global _usual
    _usual = gc.get_threshold()
    gc.set_threshold(_SELDOM, *_usual[1:])


def as_usual() -> None:
    """Search as before :func:`seldom`, unless the script has meanwhile said how often itself."""
    if _usual and gc.get_threshold() == (_SELDOM, *_usual[1:]):
        gc.set_threshold(*_usual)
