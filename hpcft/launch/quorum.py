"""Which nodes are dead, decided without a coordinator: a pure state machine.

Every node runs one :class:`Quorum`, feeds it what it hears and asks it at every tick what to do.
Nothing here knows sockets or clocks, so that tests drive it through any schedule.

What a node knows of another, and what follows:

=====================  ====================================================================
its connection closed  Its shepherd process is gone, and its ranks with it (they ask the kernel
                       to be killed with their parent). Certain, so it is *gone* at once.
silence                Dead, hung or cut off: nobody can tell. After ``timeout`` a node that still
                       hears a majority *suspects* it, for good, and says so to all.
a majority suspects    It is *gone*, and the others go on without it.
being suspected        Its own ranks are killed at once, whether or not a majority agrees.
=====================  ====================================================================

Suspicions only accumulate, who passes one on passes on all it has, and a node decides on all it
has or on none. So of two decisions one includes the other, as any two majorities share a node:
never do two sides decide to go on without each other, however the network falls apart. A majority
is counted, by ranks, over the nodes not gone; half is enough for the side that has the lowest
node, so that two nodes survive the loss of one. That the measure shrinks with each decision, and
so lets few survive of many if they fail one after the other, is dynamic voting (Jajodia and
Mutchler, ACM TODS 15(2), 1990).

The other half is the lease. A beat carries its sender's clock, and the answer echoes it. A node
whose beats sent within the last ``lease`` seconds a majority has not answered *holds* its ranks
(stops them), because ``timeout > lease`` after the receipt of such a beat the others may go on
without it. So a node that is cut off stands still before the others go on, whatever the clocks
show, as long as they run at about the same rate (Gray and Cheriton, "Leases", SOSP 1989). If the
silence was a stall of the machine and the others still count the node in, it lets its ranks go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """What to do after a tick.

    suspected: nodes newly suspected; seconds since each was last heard.
    hold: this node's ranks must not run now.
    fenced: this node is suspected itself, or held for too long; its ranks must be killed.
    """

    suspected: Mapping[int, float] = field(default_factory=dict)
    hold: bool = False
    fenced: bool = False


class Quorum:
    """One node's view of the others.

    Parameters
    ----------
    me: this node.
    weights: number of ranks on every node, this one included.
    timeout: seconds of silence after which a node is suspected.
    lease: seconds a node may go on without an answer from the majority; below ``timeout``.
    now: this node's clock, in seconds.

    Attributes
    ----------
    suspects: nodes that somebody with a majority has not heard.
    gone: nodes that are dead for certain, or by decision of a majority.
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
        self._suspicions: dict[int, frozenset[int]] = dict.fromkeys(weights, frozenset())
        self._ticked = now
        self._held_since: float | None = None
        self.suspects: frozenset[int] = frozenset()
        self.gone: set[int] = set()

    def heard(self, node: int, now: float, echo: float | None = None) -> None:
        """``node`` sent something; ``echo`` is the newest of our own clocks it has seen."""
        self._heard[node] = now
        if echo is not None:
            self._answered[node] = max(self._answered[node], echo)

    def told(self, node: int, suspects: Iterable[int]) -> None:
        """``node`` suspects these, all it ever has; from now on so does this node."""
        self._suspicions[node] |= frozenset(suspects)
        self.suspects |= self._suspicions[node]
        self._suspicions[self._me] = self.suspects

    def lost(self, node: int) -> None:
        """``node`` is gone: certainly so, or by a decision somebody has learnt of."""
        self.gone.add(node)

    def answers(self, node: int) -> bool:
        """Whether beats of ``node`` are to be answered; a suspect's lease must end."""
        return node not in self.suspects

    def decided(self) -> frozenset[int]:
        """The nodes, not yet gone, that a majority suspects; they are gone from now on."""
        open_ = self.suspects - self.gone
        if not open_ or not self._majority(
            {node for node in self._present() if open_ <= self._suspicions[node]}
        ):
            return frozenset()
        self.gone |= open_
        return open_

    def tick(self, now: float) -> Verdict:
        """Judge. To be called a few times within ``lease``, after all input has been fed."""
        # Time in which this node did not run is no evidence against the others.
        stalled = max(0.0, now - self._ticked - self._lease / 2)
        self._ticked = now
        if stalled:
            for node in self._heard:
                self._heard[node] = min(now, self._heard[node] + stalled)
        if self._me in self.suspects | self.gone:
            return Verdict(fenced=True)
        leased = {
            node
            for node in self._trusted()
            if node == self._me or now - self._answered[node] <= self._lease
        }
        if not self._majority(leased):
            # Who is perhaps cut off itself is in no position to suspect others.
            if self._held_since is None:
                self._held_since = now
            # Nobody has answered for so long that nobody will.
            return Verdict(hold=True, fenced=now - self._held_since > 4 * self._timeout)
        if self._held_since is not None:
            # After a cut the others' messages come in one by one.
            self._held_since = None
            self._heard = dict.fromkeys(self._heard, now)
        silent = {
            node: now - self._heard[node]
            for node in self._trusted()
            if node != self._me and now - self._heard[node] > self._timeout
        }
        if not silent or not self._majority(self._trusted() - silent.keys()):
            return Verdict()
        self.told(self._me, silent.keys())
        return Verdict(silent)

    def _present(self) -> set[int]:
        return self._weights.keys() - self.gone

    def _trusted(self) -> set[int]:
        return self._present() - self.suspects

    def _majority(self, side: set[int]) -> bool:
        present = self._present()
        twice = 2 * sum(self._weights[node] for node in side)
        whole = sum(self._weights[node] for node in present)
        return twice > whole or (twice == whole and min(present) in side)
