"""A spare that has let go of what its script had made, and stays a member of the world.

Where memory is short a spare's model, its optimizer's memory and the data that its script has
loaded are worth less than what the ranks need that train. The script is unwound, as for being run
anew (:mod:`hpcft.world.script`), and the process waits here instead: with Python, the libraries and
its place in MPI, and little else. It takes part in recoveries from here. It runs its script again
when there is memory for it, or when it is to train: then the others wait for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

from hpcft.train.healing import Healer
from hpcft.train.lasting import Lasting
from hpcft.world.link import Link
from hpcft.world.recovery import NotWarm, Report, World


class _Warmer(Exception):
    """There is memory again."""


def stand_by(lasting: Lasting) -> None:
    """Wait, without a script; returns when it is to be run.

    Raises
    ------
    SystemExit: training is over.
    HpcftError: the run ends.
    """
    world, link = lasting.session.world, lasting.session.world.link
    assert link is not None
    healer = Healer(lasting)
    _give_back()
    link.send("warmth", bare=True)
    link.departures.wait()
    try:
        while not world.park(idle=lambda: _look(link)):
            if _recover(world, healer):
                link.departures.pause()
                return
    except (_Warmer, NotWarm):
        return
    lasting.pace.close()
    link.send("agreed", handed_over=False)
    raise SystemExit(0)


def _look(link: Link) -> None:
    if not link.bare:
        raise _Warmer


def _recover(world: World, healer: Healer) -> bool:
    """Come to a new world with the others, as a spare that stays one; whether all run anew."""
    # If it is to train, this is not how it comes to it.
    assert world.link is not None
    tight = world.link.tight
    report = Report(world.world, -1, whole=True, broken=False, cold=True, tight=tight)
    return healer.heal(report, lambda comm, plan: None, agreed=True).transfer.anew


def _give_back() -> None:
    """Return what is free to the kernel."""
    gc.collect()
    # glibc's own; elsewhere the memory is used again at least.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
