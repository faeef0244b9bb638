"""Parity over a set of nodes: of what one of them loses the others make it anew.

As in RAID 5, and in SCR's XOR scheme. A set has one rank of each of G nodes. The file of each is
cut into chunks that go round robin to the other members; a member keeps, for every stripe, the
exclusive or of the chunks it gets. So a node keeps 1 / (G - 1) of the size of a file for another's
sake, where a copy takes all of it, and any one member's file can be made from those of the others
and what they keep::

    stripe t:   rank 0's   rank 1's   rank 2's      with G = 3, each rank's chunks 2t and 2t + 1
      kept by 0            2t         2t            A file that has ended counts as zeros.
      kept by 1 2t                    2t + 1
      kept by 2 2t + 1     2t + 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

#: Bytes of a chunk.
CHUNK = 1 << 20


@dataclass(frozen=True)
class Parity:
    """What a member keeps for the others.

    owner: its rank.
    members: the ranks of the set, in order.
    names, sizes: of each member's file, in bytes; of the owner's nothing.
    """

    owner: int
    members: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, plain: Any) -> Parity:
        """From what :mod:`json` has made of it.

        Raises
        ------
        ValueError: it is none.
        """
        try:
            made = cls(
                int(plain["owner"]),
                tuple(plain["members"]),
                tuple(plain["names"]),
                tuple(plain["sizes"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no parity: {error!r}") from error
        numbers = (*made.members, *made.sizes)
        if (
            made.owner not in made.members
            or not len(made.members) == len(made.names) == len(made.sizes) > 1
            or not all(type(name) is str for name in made.names)
            or not all(type(number) is int and number >= 0 for number in numbers)
        ):
            raise ValueError("no parity: its numbers make no sense")
        return made

    @property
    def size(self) -> int:
        """Bytes it has."""
        return stripes(max(self.sizes), len(self.members)) * CHUNK


def stripes(size: int, members: int) -> int:
    """How many stripes a file of ``size`` bytes reaches into."""
    return -(-size // (CHUNK * (members - 1)))


def chunks(size: int, members: Sequence[int], source: int, keeper: int) -> Iterator[range]:
    """The bytes of ``source``'s file whose parity ``keeper`` keeps, a range for each stripe."""
    first = slot(members, source, keeper)
    for number in range(first, -(-size // CHUNK), len(members) - 1):
        yield range(number * CHUNK, min(size, (number + 1) * CHUNK))


def slot(members: Sequence[int], source: int, keeper: int) -> int:
    """Which of a file's chunks in a stripe goes to ``keeper``."""
    place = members.index(keeper)
    return place - (place > members.index(source))
