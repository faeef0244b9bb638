"""How a step is broken off."""

from __future__ import annotations

from hpcft.world.script import ScriptInterrupted


class LetGo(ScriptInterrupted):
    """This spare lets go of what its script has made; nobody else runs anew."""


class StepInterrupted(BaseException):
    """A rank has failed; the step is broken off at one of its two edges.

    Not an Exception, so that a training loop's ``except Exception`` lets it pass.
    """


class Late(BaseException):
    """Others have made the step without this rank, whose gradients came too late for it.

    Not an Exception, for the same reason.
    """
