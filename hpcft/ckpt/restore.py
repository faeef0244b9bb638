"""Reading a checkpoint back: everything is checked before it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcft.ckpt import reader, tree
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.index import OWN, Damaged
from hpcft.ckpt.reader import Opened, opened


def load(path: Path, engine: Engine) -> tuple[int, dict[str, Any]]:
    """Read a whole checkpoint.

    Returns
    -------
    (step, tree): steps completed, and the state.

    Raises
    ------
    Damaged: something in it is not as it was written; names the leaves.
    OSError: it cannot be read.
    """
    with opened(path) as checkpoint:
        return checkpoint.step, _read(checkpoint, engine)


def _read(checkpoint: Opened, engine: Engine) -> dict[str, Any]:
    content = checkpoint.index
    blanks: dict[int, tuple[Any, Any]] = {}

    def memory(leaf: int) -> Any:
        blanks[leaf] = tree.blank(content.specs[leaf])
        return blanks[leaf][1]

    try:
        bad = reader.read(checkpoint, engine, memory)
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise Damaged(f"damaged are {', '.join(bad[:3])}{more}", "restore another checkpoint")
        values = [
            tree.value(spec, (blanks.get(i) or tree.blank(spec))[0])
            for i, spec in enumerate(content.specs)
        ]
    except (ValueError, RuntimeError, MemoryError) as error:
        raise Damaged(f"the index is damaged, or memory too small: {error}") from error
    whole = tree.unflatten(content.structure, values)
    if not isinstance(whole, dict):
        raise Damaged("the index is damaged: no state")
    whole.pop(OWN, None)
    return whole
