"""What becomes of the membership when nobody stops to agree on it.

Every process works it out for itself, from the deaths that the shepherds have told it of. It
depends on which these are, and when they were, and not on the order in which they became known: so
all come to the same membership as soon as all know the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hpcft.world.link import Failure
from hpcft.world.membership import Healing, Membership, Policy, heal


def succeed(
    base: Membership, failures: Collection[Failure], hosts: Mapping[int, str], policy: Policy
) -> list[Healing]:
    """The memberships that follow ``base``, one for each death of a member.

    Parameters
    ----------
    base: the last that all have agreed on.
    failures: those that are known; of strangers, too.

    Raises
    ------
    TooFewRanks: fewer are left than the policy lets go on.
    """
    healings: list[Healing] = []
    membership = base
    for failure in sorted(failures, key=lambda failure: (failure.at, failure.rank)):
        if failure.rank in membership.members:
            alive = frozenset(membership.members) - {failure.rank}
            healings.append(heal(membership, alive, hosts, policy))
            membership = healings[-1].after
    return healings
