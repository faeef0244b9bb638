"""Which nodes are dead, decided without a coordinator: a pure state machine.

Every node runs one :class:`Quorum`, feeds it what it hears and asks it at every tick what to do.
Nothing here knows sockets or clocks, so that tests drive it through any schedule.

What a node knows of another, and what follows:

=====================  ====================================================================
its connection closed  Its shepherd process is gone, and its ranks with it (they ask the kernel
                       to be killed with their parent). Certain, so acted on at once.
silence                Dead, hung or cut off: nobody can tell. Declared dead after ``timeout``,
                       but only by a node that still hears a majority.
being told             The set of the dead only grows and is passed on to everybody, so that
                       all come to the same set. Who finds itself in it ends its own ranks.
=====================  ====================================================================

The other half is the lease. A beat carries its sender's clock, and the answer echoes it. A node
whose beats sent within the last ``lease`` seconds a majority has not answered *holds* its ranks
(stops them), because ``timeout > lease`` after the receipt of such a beat the others may go on
without it. Whoever is declared dead by silence has therefore been held before that, whatever the
clocks show, as long as they run at about the same rate (Gray and Cheriton, "Leases", SOSP 1989).
If the silence was a stall of the machine and the others still count the node in, it lets its
ranks go on.

A majority is counted over the nodes not dead, weighted by their ranks. Half is enough for the side
that has the lowest node, so that two nodes survive the loss of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """What to do after a tick.

    declared: nodes to be declared dead by silence; seconds since each was last heard.
    hold: this node's ranks must not run now.
    fenced: this node was declared dead, or held for too long; its ranks must be killed.
    """

    declared: Mapping[int, float] = field(default_factory=dict)
    hold: bool = False
    fenced: bool = False


class Quorum:
    """One node's view of the others.

    Parameters
    ----------
    me: this node.
    weights: number of ranks on every node, this one included.
    timeout: seconds of silence after which a node is declared dead.
    lease: seconds a node may go on without an answer from the majority; below ``timeout``.
    now: this node's clock, in seconds.
    """

    def __init__(
        self, me: int, weights: Mapping[int, int], timeout: float, lease: float, now: float
    ) -> None:
        if lease >= timeout:
            raise ValueError("the lease must end before the others go on without us")
        self._me = me
        self._weights = dict(weights)
        self._timeout = timeout
        self._lease = lease
        self._heard = dict.fromkeys(weights, now)
        self._answered = dict.fromkeys(weights, now)
        self._ticked = now
        self._held_since: float | None = None
        self.dead: set[int] = set()

    def heard(self, node: int, now: float, echo: float | None = None) -> None:
        """``node`` sent something; ``echo`` is the newest of our own clocks it has seen."""
        self._heard[node] = now
        if echo is not None:
            self._answered[node] = max(self._answered[node], echo)

    def lost(self, node: int) -> None:
        """``node`` is dead for certain, or was declared dead by another."""
        self.dead.add(node)

    def tick(self, now: float) -> Verdict:
        """Judge. To be called a few times within ``lease``, after all input has been fed."""
        # Time in which this node did not run is no evidence against the others.
        stalled = max(0.0, now - self._ticked - self._lease / 2)
        self._ticked = now
        if stalled:
            for node in self._heard:
                self._heard[node] = min(now, self._heard[node] + stalled)
        if self._me in self.dead:
            return Verdict(fenced=True)
        leased = {
            node
            for node in self._alive()
            if node == self._me or now - self._answered[node] <= self._lease
        }
        if not self._majority(leased):
            # Who is perhaps cut off itself is in no position to declare others dead.
            if self._held_since is None:
                self._held_since = now
            # Nobody has answered for so long that nobody will.
            return Verdict(hold=True, fenced=now - self._held_since > 4 * self._timeout)
        self._held_since = None
        silent = {
            node: now - self._heard[node]
            for node in self._alive()
            if node != self._me and now - self._heard[node] > self._timeout
        }
        if not self._majority(self._alive() - silent.keys()):
            return Verdict()
        self.dead |= silent.keys()
        return Verdict(silent)

    def _alive(self) -> set[int]:
        return self._weights.keys() - self.dead

    def _majority(self, side: set[int]) -> bool:
        alive = self._alive()
        twice = 2 * sum(self._weights[node] for node in side)
        whole = sum(self._weights[node] for node in alive)
        return twice > whole or (twice == whole and min(alive) in side)
