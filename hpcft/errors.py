"""The exceptions a user of hpcft sees.

Every one of them says what is wrong in its message and, where something can be done about it, what
to do in ``remedy``. The command line prints both on one line and ends with ``exit_code``.
"""

from __future__ import annotations

from typing import ClassVar


class HpcftError(Exception):
    """Base of all errors that hpcft raises on purpose.

    Parameters
    ----------
    message
        What is wrong, one sentence, without a final full stop.
    remedy
        What the reader can do about it; empty where there is nothing to advise.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[HpcftError], tuple[object, ...]]:
        # The default would pickle only what went to Exception.__init__ and lose the remedy.
        return type(self), (self.message, self.remedy)

    @property
    def line(self) -> str:
        """Message and remedy as the command line prints them."""
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


#: Exit code of a run that was asked to end and has saved where it had come to: started again it
#: goes on from there. EX_TEMPFAIL of sysexits.h.
INTERRUPTED = 75


def shell_code(code: int) -> int:
    """What a shell calls the exit code of a process that :mod:`subprocess` has waited for.

    128 and the signal's number if it was killed by one.
    """
    return code if code >= 0 else 128 - code


class UsageError(HpcftError):
    """hpcft was asked for something that cannot work here; raised before anything is started."""

    exit_code = 2


class TooFewRanks(HpcftError):
    """So many ranks have failed that the policy does not let the job go on."""

    exit_code = 3


class StateLost(HpcftError):
    """No survivor holds a complete copy of the training state."""

    exit_code = 3


class RunFailed(HpcftError):
    """A run that was started for somebody who waits for its result has failed."""
