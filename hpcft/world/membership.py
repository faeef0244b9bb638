"""Who is in the world, as pure data; and what becomes of it when ranks die.

Two numbers name a process. Its *world* rank is fixed for its life: the rank it has in
``MPI_COMM_WORLD``. Its *logical* rank is the part it plays in training; a spare has none until
it takes over that of a failed rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcft.errors import TooFewRanks


@dataclass(frozen=True)
class Policy:
    """What to do about a failure.

    substitute: let a spare take the failed logical rank while there are spares.
    shrink: go on with fewer ranks when there are none.
    min_ranks: never go on with fewer active ranks than this.
    """

    substitute: bool = True
    shrink: bool = True
    min_ranks: int = 1


@dataclass(frozen=True)
class Membership:
    """The world of one epoch.

    epoch: counts the recoveries; 0 is the world as launched.
    active: ``active[logical]`` is the world rank that plays ``logical``.
    spares: world ranks that are parked, in order of launch.
    """

    epoch: int
    active: tuple[int, ...]
    spares: tuple[int, ...]

    @classmethod
    def launch(cls, size: int, spares: int) -> Membership:
        """The world of ``size`` processes of which the last ``spares`` are parked."""
        return cls(0, tuple(range(size - spares)), tuple(range(size - spares, size)))

    @property
    def members(self) -> tuple[int, ...]:
        return tuple(sorted((*self.active, *self.spares)))

    def logical(self, world: int) -> int | None:
        """The logical rank that process ``world`` plays, or None for a spare or a stranger."""
        return self.active.index(world) if world in self.active else None


@dataclass(frozen=True)
class Adoption:
    """Process ``world``, a spare until now, plays ``logical`` in place of process ``failed``."""

    logical: int
    world: int
    failed: int


@dataclass(frozen=True)
class Healing:
    """The step from one membership to the next.

    failed: logical ranks (of the old membership) whose process died.
    adoptions: those of them a spare took over.
    dropped: those of them nobody plays any more; the ranks above moved down.
    spares_lost: world ranks of spares that died.
    replaced: logical ranks that spares took over from processes that have become spares; ``failed``
        is who did.
    """

    before: Membership
    after: Membership
    failed: tuple[int, ...]
    adoptions: tuple[Adoption, ...]
    dropped: tuple[int, ...]
    spares_lost: tuple[int, ...]
    replaced: tuple[Adoption, ...] = ()

    @property
    def dead(self) -> list[int]:
        """World ranks of all that died, active ones first."""
        return [*(self.before.active[r] for r in self.failed), *self.spares_lost]

    @property
    def action(self) -> str:
        """``substitute``, ``shrink``, ``substitute+shrink``, ``replace``, or ``none``.

        None is needed when only spares have died.
        """
        parts = ["substitute"] * bool(self.adoptions) + ["shrink"] * bool(self.dropped)
        parts += ["replace"] * bool(self.replaced)
        return "+".join(parts) or "none"


def heal(
    before: Membership,
    alive: frozenset[int],
    hosts: Mapping[int, str],
    policy: Policy,
    slow: frozenset[int] = frozenset(),
    stepping_down: frozenset[int] = frozenset(),
    cold: frozenset[int] = frozenset(),
    tight: frozenset[int] = frozenset(),
) -> Healing:
    """Work out the next membership from who is left.

    Every survivor calls this with the same arguments and so comes to the same answer; nothing
    is negotiated. A spare that is not slow is preferred, then one that is warm, then one on a host
    with memory for what it is to do, and then one on a host where nothing has just died, for a
    failure is often the host's.

    Who is to step down does so only where nobody has died who trained, and for a spare that is not
    slow. Its state goes with it; so one rank must be left that has it.

    Parameters
    ----------
    before: the last membership all survivors agreed on.
    alive: world ranks that are left.
    hosts: host name of every world rank.
    policy: what is allowed.
    slow: world ranks that are slower than the others, or were when last seen training.
    stepping_down: world ranks that are to change places with spares.
    cold: spares that have to run their script before they can train.
    tight: spares on hosts without memory to spare.

    Raises
    ------
    TooFewRanks: fewer than ``policy.min_ranks`` would be left, or the policy forbids what
        would be needed.
    """
    failed = tuple(r for r, w in enumerate(before.active) if w not in alive)
    spares = [w for w in before.spares if w in alive]
    suspect = {hosts[w] for w in before.members if w not in alive}
    active: list[int | None] = [w if w in alive else None for w in before.active]
    adoptions: list[Adoption] = []
    if policy.substitute:
        for logical in failed:
            if not spares:
                break
            # min() keeps launch order among equals.
            spare = min(
                spares, key=lambda w: (w in slow, w in cold, w in tight, hosts[w] in suspect)
            )
            spares.remove(spare)
            active[logical] = spare
            adoptions.append(Adoption(logical, spare, before.active[logical]))
    dropped = tuple(r for r, w in enumerate(active) if w is None)
    left = tuple(w for w in active if w is not None)
    if dropped and not policy.shrink:
        raise TooFewRanks(
            f"no spare is left for rank {', '.join(map(str, dropped))}, "
            "and shrinking is not allowed",
            "give more --spares, or allow it with --on-failure substitute,shrink",
        )
    if len(left) < max(policy.min_ranks, 1):
        raise TooFewRanks(
            f"{len(left)} ranks are left and --min-ranks is {policy.min_ranks}",
            "give more --spares or a lower --min-ranks",
        )
    lost = tuple(w for w in before.spares if w not in alive)
    replaced = () if failed else _replaced(left, spares, hosts, slow, stepping_down, cold, tight)
    for one in replaced:
        left = (*left[: one.logical], one.world, *left[one.logical + 1 :])
        spares = sorted({*spares, one.failed} - {one.world})
    after = Membership(before.epoch + 1, left, tuple(spares))
    return Healing(before, after, failed, tuple(adoptions), dropped, lost, replaced)


def _replaced(
    active: Sequence[int],
    spares: Sequence[int],
    hosts: Mapping[int, str],
    slow: frozenset[int],
    stepping_down: frozenset[int],
    cold: frozenset[int],
    tight: frozenset[int],
) -> tuple[Adoption, ...]:
    """Who takes over from those that step down, as far as that can be."""
    leaving = [w for w in active if w in stepping_down][: len(active) - 1]
    # What makes a rank slow is often its host.
    suspect = {hosts[w] for w in leaving}
    trusted = sorted(
        (w for w in spares if w not in slow),
        key=lambda w: (w in cold, w in tight, hosts[w] in suspect),
    )
    return tuple(
        Adoption(active.index(w), spare, w) for w, spare in zip(leaving, trusted, strict=False)
    )
