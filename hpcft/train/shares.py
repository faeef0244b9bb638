"""How a batch is shared out among ranks that differ in speed: pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

#: One for each rank, in proportion to what it is to have; none: all have the same.
Weights = tuple[int, ...]
#: Epoch, and samples of it that come before.
Place = tuple[int, int]

#: The mean weight.
_UNIT = 1000
#: No rank is given more than so many times its even share, for its memory may not hold more.
_MOST = 2
#: What part of a step's computing time a change of shares must save.
_WORTH = 0.05


@lru_cache(maxsize=256)
def counts(count: int, weights: Weights) -> tuple[int, ...]:
    """``count`` samples, shared out in proportion: to each rank one at least.

    By largest remainders; of equals the lower rank comes first. The same in all ranks, for only
    integers are reckoned with.

    Raises
    ------
    ValueError: there are not enough samples for one each.
    """
    if count < len(weights):
        raise ValueError(f"{count} samples are not one for each of {len(weights)} ranks")
    total = sum(weights)
    shares = [max(1, count * weight // total) for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda rank: (-(count * weights[rank] % total), rank))
    for rank in by_rest[: max(0, count - sum(shares))]:
        shares[rank] += 1
    while sum(shares) > count:
        # Those who have one more than their due, for others are to have one.
        shares[max(range(len(shares)), key=lambda rank: (shares[rank], -rank))] -= 1
    return tuple(shares)


@dataclass(frozen=True)
class Plan:
    """The shares, now and from places on that no rank has read up to yet.

    stages: in order, from where on which weights hold; before the first all ranks have the same.
    """

    stages: tuple[tuple[Place, Weights], ...] = ()

    def at(self, place: Place) -> Weights:
        """The weights for the batch that begins there."""
        return next((w for since, w in reversed(self.stages) if place >= since), ())

    def changed(self, weights: Weights, since: Place, here: Place) -> Plan:
        """With other weights from a place on.

        Parameters
        ----------
        since: not before that of a former change.
        here: what is before that is over.
        """
        over = sum(place <= here for place, _ in self.stages)
        return Plan((*self.stages[max(0, over - 1) :], (since, weights)))

    def fits(self, ranks: int) -> bool:
        """Whether it is for so many ranks."""
        return all(len(weights) == ranks for _, weights in self.stages)

    def as_numbers(self) -> list[list[int]]:
        """For the state."""
        return [[*since, *weights] for since, weights in self.stages]

    @classmethod
    def of(cls, numbers: Sequence[Sequence[int]]) -> Plan:
        """The inverse of :meth:`as_numbers`."""
        return cls(tuple(((one[0], one[1]), tuple(one[2:])) for one in numbers))


@dataclass(frozen=True)
class Speed:
    """What a rank has measured.

    seconds: of computing in a step, the median.
    samples: its share in those steps.
    read: how far it has read ahead.
    """

    seconds: float
    samples: int
    read: Place


def better(speeds: Sequence[Speed]) -> Weights | None:
    """Weights with which steps would be shorter by an amount that matters; None if there are none.

    Parameters
    ----------
    speeds: of all ranks, by rank.
    """
    if len(speeds) < 2 or any(one.samples < 1 or not one.seconds > 0 for one in speeds):
        return None
    rates = [one.samples / one.seconds for one in speeds]
    mean = fmean(rates)
    weights = tuple(max(1, round(min(_MOST, rate / mean) * _UNIT)) for rate in rates)
    shared = counts(sum(one.samples for one in speeds), weights)
    now = max(one.seconds for one in speeds)
    then = max(count / rate for count, rate in zip(shared, rates, strict=True))
    return weights if then < (1 - _WORTH) * now and math.isfinite(then) else None
