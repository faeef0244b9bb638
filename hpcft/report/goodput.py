"""Which part of a run's wall time went into steps that count, and where the rest went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hpcft.report.pace import Laps, Tally, Window
from hpcft.report.spans import Span


@dataclass(frozen=True)
class Goodput:
    """A run's wall time in seconds, part by part; the parts sum up to ``whole``.

    Outside of training a part is what :class:`hpcft.report.spans.Span` says. Each second of
    training is divided as the steps around it were, by the mean over the ranks that trained:

    whole: from the launcher's begin, or the first event where that is not known, to the end of the
        run, the last sign of it, or now.
    steps: computing, and as much waiting as also the rank has that waits least, in steps that
        count: the others' waiting beyond that is for others, this is for the transfer itself.
    starting: until the first step, at the first start and at each restart by Slurm.
    recovery: from a failure until the ranks go on.
    relaunch: from a failure until the first step after all ranks have been started again.
    resize: from the ranks' leaving until the first step as more or fewer.
    again: steps that were done, lost when the ranks went back, and had to be done again; the first
        time, which was for nothing, is counted, the second one is not.
    saving: at steps' ends, for checkpoints and for leaving in order.
    waiting: waiting beyond that of the rank that waits least: for slower ranks.
    restart: between the end of a Slurm job step and the begin of the next.
    ending: from the last step, or the failure that nobody recovered from, to the end.
    measured: which part of the training has left laps, 0 to 1. Where there are none it is divided
        as the rest; if there are none at all it is all taken for steps that count.
    """

    whole: float
    steps: float
    starting: float
    recovery: float
    relaunch: float
    resize: float
    again: float
    saving: float
    waiting: float
    restart: float
    ending: float
    measured: float

    @property
    def parts(self) -> dict[str, float]:
        """Those that sum up to the whole."""
        parts = asdict(self)
        del parts["whole"], parts["measured"]
        return parts

    @property
    def part(self) -> float:
        """That of steps that count, 0 to 1."""
        return self.steps / self.whole if self.whole else 0.0


@dataclass(frozen=True)
class _Shares:
    """How training is divided; what is left are steps that count."""

    again: float = 0.0
    saving: float = 0.0
    waiting: float = 0.0


def goodput(spans: Sequence[Span], laps: Laps) -> Goodput:
    """Divide the time of spans that follow each other; the laps' windows cover all training."""
    seconds = dict.fromkeys(
        ("starting", "recovery", "relaunch", "resize", "restart", "ending"), 0.0
    )
    for span in spans:
        if span.doing != "training":
            seconds[span.doing] += span.seconds
    again = saving = waiting = steps = 0.0
    measured = trained = 0.0
    shares = _all_shares(laps)
    at = 0
    for span in (span for span in spans if span.doing == "training"):
        while at < len(laps.windows) and laps.windows[at].end <= span.begin:
            at += 1
        number = at
        while number < len(laps.windows) and laps.windows[number].begin < span.end:
            window = laps.windows[number]
            length = max(0.0, min(window.end, span.end) - max(window.begin, span.begin))
            share = shares[number]
            again += length * share.again
            saving += length * share.saving
            waiting += length * share.waiting
            steps += length * max(0.0, 1 - share.again - share.saving - share.waiting)
            measured += length * (laps.tallies[number].seconds > 0)
            number += 1
        trained += span.seconds
    return Goodput(
        whole=math.fsum(span.seconds for span in spans),
        steps=steps,
        again=again,
        saving=saving,
        waiting=waiting,
        measured=min(1.0, measured / trained) if trained else 0.0,
        **seconds,
    )


def _all_shares(laps: Laps) -> list[_Shares]:
    """Of each window. One without laps is like the nearest before it in the same launch, else like
    the nearest after it."""
    own = [_of(tally) for tally in laps.tallies]
    found: list[_Shares | None] = list(own)
    for order in (range(len(own)), range(len(own) - 1, -1, -1)):
        last: tuple[Window, _Shares] | None = None
        for number in order:
            window, share = laps.windows[number], found[number]
            if share is not None:
                last = window, share
            elif last and (last[0].launch, last[0].kept) == (window.launch, window.kept):
                found[number] = last[1]
    everything = _of(_sum(laps.tallies)) or _Shares()
    return [everything if share is None else share for share in found]


def _of(tally: Tally) -> _Shares | None:
    whole = tally.seconds
    if whole <= 0:
        return None
    # What is sent takes time also when nobody is late.
    transfer = min(tally.least * tally.counted, tally.waiting) if tally.least < math.inf else 0.0
    late = tally.waiting - transfer if tally.least < math.inf else 0.0
    return _Shares(tally.lost / whole, tally.saving / whole, max(0.0, late) / whole)


def _sum(tallies: Sequence[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.counted += tally.counted
        total.waiting += tally.waiting
        total.saving += tally.saving
        total.lost += tally.lost
        if tally.least < math.inf:
            total.least = min(total.least, tally.least)
    return total
