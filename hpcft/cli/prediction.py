"""What the commands share that look ahead."""

from __future__ import annotations

import importlib.util

from rich.console import Console

from hpcft.errors import UsageError


def require_scipy(what: str) -> None:
    """See that there is what estimates and simulations need.

    Parameters
    ----------
    what: needs it.

    Raises
    ------
    UsageError: it is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UsageError(f"{what} needs scipy", "pip install 'hpcft[foresight]'")


def between_failures() -> float:
    """Seconds between failures of one node, by the record; says what it reads."""
    from hpcft.foresight import gathering

    with Console(stderr=True).status("reading ...") as status:
        return gathering.estimate(gathering.gather(status.update)).between
