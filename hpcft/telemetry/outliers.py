"""Who is slower than the others, by statistics that the slow themselves do not move."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from statistics import median_low
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)

#: Of a normal distribution the standard deviation, in median absolute deviations.
_SIGMA = 1.4826
#: How many standard deviations from the median are far; and how many per cent are much. Both are
#: asked for: ranks that are all alike would differ by many of no size.
_FAR, _MUCH = 3.5, 0.2
#: The least that is taken for a deviation, as a part of the median: what buckets are exact to.
_BLUR = 0.05
#: Who is not further from the median than this part of it is as fast as the others.
_ALIKE = 0.1
#: So many times as long may who was slow take in a trial to be trusted again.
PASSABLE = 1 + _MUCH


@dataclass(frozen=True)
class Standing:
    """How one compares with all.

    value: what it takes, in seconds.
    others: the median of all, itself included.
    deviation: their median absolute deviation.
    score: by how many standard deviations, taken from that one, it takes longer.
    """

    value: float
    others: float
    deviation: float
    score: float

    @property
    def far(self) -> bool:
        """Whether it is slower than chance explains, and by an amount that matters."""
        return self.score > _FAR and self.value > (1 + _MUCH) * self.others

    @property
    def alike(self) -> bool:
        """Whether it is no slower than the others; between this and :attr:`far` is neither."""
        return self.value <= (1 + _ALIKE) * self.others

    @property
    def factor(self) -> float:
        """How many times as long it takes."""
        return self.value / self.others if self.others else 1.0


def compare(values: Mapping[Key, float]) -> dict[Key, Standing]:
    """How each compares with all.

    The median absolute deviation is not moved by the slow, as long as they are not the most. Of an
    even number the lower median is taken, so that of two the faster is the measure.

    Parameters
    ----------
    values: seconds of each; at least one.
    """
    middle = median_low(values.values())
    deviation = median_low(abs(value - middle) for value in values.values())
    sigma = max(_SIGMA * deviation, _BLUR * middle)
    return {
        key: Standing(value, middle, deviation, (value - middle) / sigma if sigma else 0.0)
        for key, value in values.items()
    }
