"""What a rank runs when a function is to be trained: ``python -m hpcft.function FOLDER``.

``FOLDER/function.pkl`` has the function and its arguments; what it returns in the process that is
logical rank 0 is left in ``FOLDER/result.pkl``. Both are made by cloudpickle, for functions of a
notebook or of a script can be imported by nobody.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

_FUNCTION, _RESULT = "function.pkl", "result.pkl"


def give(folder: Path, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Leave a function for the ranks, and take away what an earlier one may have returned.

    Raises
    ------
    OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RESULT).unlink(missing_ok=True)
    (folder / _FUNCTION).write_bytes(cloudpickle.dumps((function, args, kwargs)))


def take(folder: Path) -> Any:
    """What the function has returned.

    Raises
    ------
    FileNotFoundError: it has not.
    """
    return pickle.loads((folder / _RESULT).read_bytes())


def main() -> None:
    """Call it, in a rank."""
    # Not above, for it starts MPI.
    from hpcft.world.session import current

    folder = Path(sys.argv[1])
    function, args, kwargs = pickle.loads((folder / _FUNCTION).read_bytes())
    result = function(*args, **kwargs)
    if current().world.logical == 0:
        aside = folder / f".{_RESULT}.{os.getpid()}"
        aside.write_bytes(cloudpickle.dumps(result))
        aside.replace(folder / _RESULT)


if __name__ == "__main__":
    main()
