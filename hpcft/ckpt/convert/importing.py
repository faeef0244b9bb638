"""Committing what others have written as a checkpoint of ours."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.convert import dcp, safetensors_files, torch_files
from hpcft.ckpt.convert.claim import abandoned, claimed
from hpcft.ckpt.convert.leaves import Advance
from hpcft.ckpt.index import OWN
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import SaveFailed, Saver
from hpcft.ckpt.store import Checkpoint, Store
from hpcft.errors import HpcftError, UsageError

#: Of the directory in which an import is written.
_PREFIX = ".import-"


@dataclass(frozen=True)
class Found:
    """A state as a source holds it.

    step: steps completed; None if the source does not say.
    state: parts by name, and ``values``, as :meth:`hpcft.State.to_tree` has them.
    """

    step: int | None
    state: dict[str, Any]

    @property
    def parts(self) -> list[str]:
        """Names of the parts."""
        return [name for name in self.state if name != "values"]

    @property
    def optimizers(self) -> list[str]:
        """Names of the parts that are optimizers' states."""
        return [name for name in self.parts if _is_optimizer(self.state[name])]


@contextmanager
def opened(source: Path, part: str, room: Path, advance: Advance) -> Iterator[Found]:
    """What a source holds; its tensors are on the disk, and there while this is open.

    Parameters
    ----------
    source: a safetensors file, a directory of these, a directory of DCP, or a torch.save file.
    part: where tensors go that belong to no part.
    room: a directory with room for a copy of what cannot be mapped.

    Raises
    ------
    HpcftError: it is none of these, is damaged, or holds what only code could bring back.
    OSError: it cannot be read.
    """
    if not source.exists():
        raise UsageError(f"there is no {source}", "name a file or a directory")
    if source.is_dir() and dcp.is_directory(source):
        with dcp.read(source, room, advance) as content:
            yield _arranged(content, part, source)
    elif source.is_file() and torch_files.is_file(source):
        yield _arranged(torch_files.read(source), part, source)
    elif source.suffix == safetensors_files.SUFFIX or (
        source.is_dir() and safetensors_files.is_directory(source)
    ):
        tensors, step = safetensors_files.read(source)
        yield Found(step, {part: tensors, "values": {}})
    else:
        raise UsageError(
            f"{source} is neither safetensors, nor a directory of DCP, nor of torch.save",
            "a checkpoint of hpcft needs no import",
        )


def _arranged(content: Any, part: str, source: Path) -> Found:
    """Make parts of what was found.

    Dicts are parts; tensors beside them are one part together; what else is beside them are values.
    """
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise HpcftError(
            f"{source} holds a {type(content).__name__} and not a dict of named parts",
            "save a state_dict(), or a dict of several",
        )
    content = dict(content)
    own = content.pop(OWN, None)
    if isinstance(own, dict) and type(own.get("step")) is int and 0 <= own["step"] < 1 << 63:
        return Found(own["step"], content)
    loose = {key: item for key, item in content.items() if isinstance(item, torch.Tensor)}
    state = {key: _usable(item) for key, item in content.items() if isinstance(item, dict)}
    if loose and part in state:
        raise UsageError(f"there are tensors in no part, and a part {part}", "choose --part NAME")
    if loose:
        state = {part: loose, **state}
    values = state.pop("values", {})
    plain = {k: v for k, v in content.items() if k not in loose and not isinstance(v, dict)}
    return Found(None, {**state, "values": {**values, **plain}})


def _is_optimizer(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("state", {}), dict):
        return False
    groups = part.get("param_groups")
    return isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )


def _usable(part: dict[Any, Any]) -> dict[Any, Any]:
    """An optimizer's state as it was before DCP made text of its keys, and left it out if empty."""
    if not _is_optimizer(part):
        return part
    numbers = {
        str(number): number
        for group in part["param_groups"]
        for number in group["params"]
        if type(number) is int
    }
    state = {numbers.get(key, key): item for key, item in part.get("state", {}).items()}
    return {**part, "state": state}


def commit(
    found: Found, step: int, directory: Path, engine: Engine, advance: Advance
) -> Checkpoint:
    """Save a state and commit it; broken off, it leaves nothing.

    What is written lies in a directory of its own until it is committed: where there are no locks
    (:mod:`hpcft.ckpt.lock`) a run may be saving to the same one. What killed imports have left
    there is removed.

    Raises
    ------
    Unstorable: the state holds something that no checkpoint can.
    SaveFailed, OSError: it cannot be written.
    """
    store = Store(directory)
    for left in abandoned(directory, _PREFIX):
        shutil.rmtree(left, ignore_errors=True)
    with claimed(directory, _PREFIX) as path:
        own = Store(path).create()
        saver = Saver(own, Alone(), engine)
        save = None
        try:
            save = saver.begin(step, found.state)
            leaves = pytree.tree_leaves(found.state)
            total = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))
            while not save.advance():
                advance(save.moved, total)
                time.sleep(0.02)
            save.finish()
            return store.commit(own.committed()[-1].path, step)
        finally:
            # The engine's threads read what the caller is about to let go of.
            with suppress(SaveFailed, OSError):
                if save:
                    save.drop()
                    save.finish()
            shutil.rmtree(own.path, ignore_errors=True)
