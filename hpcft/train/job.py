"""The training job: what a script sees of it.

Who does what:

* :class:`~hpcft.train.training.Training` runs the user's loop from failure to failure. It has
* :class:`~hpcft.train.edges.Edges`, which is called at the edges of each step,
* a :class:`~hpcft.train.modes.strategy.Strategy`, which does what differs by ``--mode``,
* :class:`~hpcft.train.dealing.Dealing`, which shares out the data,
* a :class:`~hpcft.train.replica.Replica`, which knows how far this rank's state can be relied on,
* :class:`~hpcft.train.dry.DrySteps` for what spares try out, and
* :class:`~hpcft.train.healing.Recovery`, one for each.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcft.errors import HpcftError
from hpcft.train.dealing import OnShrink
from hpcft.train.evaluation import Evaluate
from hpcft.train.healing import Healer
from hpcft.train.interruption import LetGo
from hpcft.train.lasting import Lasting
from hpcft.train.process_group import WorldProcessGroup, install
from hpcft.train.state import State
from hpcft.train.training import Training
from hpcft.world import garbage, warm
from hpcft.world.script import ScriptInterrupted


class Job:
    """This process's part in a training that survives failures. Made by :func:`hpcft.init`."""

    def __init__(self, lasting: Lasting, seed: int, on_shrink: OnShrink) -> None:
        self._lasting = lasting
        self._options = lasting.session.options
        self._world = lasting.session.world
        self._seed = seed
        self._on_shrink = on_shrink
        #: The membership that this run of the script was made for.
        self._epoch = self._world.membership.epoch
        #: Whether the script has been left, to be run anew; and whether this process alone has.
        self._left = self.bare = False
        self._training: Training | None = None
        self.group = WorldProcessGroup(0, self.size, self._world.progress)
        self._healer = Healer(lasting, self.group)
        if self._world.active is None:
            self.group.park(self.rank, self.size)
        else:
            self.group.attach(self._world.active)
            self.group.refuse = self._refuse
        install(self.group)

    @property
    def rank(self) -> int:
        """Logical rank of this process; a parked spare says it is the last."""
        return self._world.part

    @property
    def size(self) -> int:
        """Number of ranks that train."""
        return self._world.size

    @property
    def spare(self) -> bool:
        """Whether this process is a parked spare."""
        return self._world.logical is None

    def run(
        self, train: Callable[[State], None], state: State, evaluate: Evaluate | None = None
    ) -> None:
        """Train, whatever happens to the ranks.

        ``train(state)`` is called, and called again after every recovery; it must go on from where
        ``state`` says. This method returns in all ranks once all have returned from ``train``; on
        spares that were not needed it ends the process.

        Parameters
        ----------
        evaluate: called with the state of each new checkpoint, its modules in eval mode and without
            gradients, in a process beside a parked spare, if ``--spares-do evaluate`` asks for
            that; returns metrics by name. Ranks never call it; a script may do so when this method
            has returned.

        Raises
        ------
        TooFewRanks: fewer ranks are left than the run may go on with.
        StateLost: no survivor has a whole copy of the state, and there is no checkpoint.
        ScriptInterrupted: the script has to be run anew; let it pass.
        """
        if self._left:
            raise HpcftError(
                "this job is that of a former run of the script",
                "call hpcft.init() in the script itself, not in a module that it imports",
            )
        garbage.as_usual()
        self._tell_imported(evaluates=evaluate is not None)
        self._training = Training(
            train,
            state,
            self._lasting,
            self.group,
            self._healer,
            self._epoch,
            self._seed,
            self._on_shrink,
        )
        self.group.refuse = None
        try:
            self._training.run()
        except ScriptInterrupted as why:
            self._left, self.bare = True, isinstance(why, LetGo)
            raise

    def _tell_imported(self, evaluates: bool) -> None:
        """The script has come to training; the shepherd may want to know by what."""
        if link := self._world.link:
            link.send("imported", modules=warm.libraries(), evaluates=evaluates)
            if not evaluates and "evaluate" in self._options["spares_do"] and self.rank == 0:
                self._lasting.teller.say(
                    "hpcft: --spares-do evaluate: job.run() is given no evaluate=..."
                )

    def _refuse(self) -> None:
        """Give up on a failure before :meth:`run`.

        What the script's collectives have given it so far may already differ between the ranks,
        and a spare, which parks with collectives of its own, has none of it.
        """
        if self._world.link is not None:
            raise ScriptInterrupted

    def leave(self) -> None:
        """The script has been unwound, to be run anew: come to the membership it is run anew with.

        Raises
        ------
        HpcftError: the run ends.
        """
        if self._training:
            self._training.close()
        if not self._left:
            self._healer.heal_untrained()
            self._left = True
        self._world.progress.run(False)
        # A spare by itself has nothing to save at any time, and is not asked.
        if self._world.link and not self.bare:
            self._world.link.departures.pause()
        # Its traceback holds the frames it has come through, and these the model.
        self.group.failure = None
