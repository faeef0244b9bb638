"""Reading a checkpoint back: everything is checked before it is believed.

Ranks that restore together read every byte once: each reads its parts (as :mod:`hpcft.ckpt.plan`
cuts the file), of a shard straight into its memory, and the checksums of the parts, combined, have
to be those of the leaves. Only then do the ranks give each other what they have read for others. So
nothing more is read than what is needed, and the file needs no checksums of smaller pieces. All
ranks get the same answer: a state, or the same error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from hpcft.ckpt import device, exchange, plan, reader, tree
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.collector import paused
from hpcft.ckpt.device import Bytes, Landing
from hpcft.ckpt.index import OWN, Damaged, Index
from hpcft.ckpt.ranks import Alone, Ranks
from hpcft.ckpt.reader import Locate, opened
from hpcft.ckpt.shards import Shard
from hpcft.ckpt.spec import Spec

#: The tensor a leaf is to come into, which is a DTensor or on a device, by the keys that lead to it
#: in the state; None: a new one.
Target = Callable[[tuple[str | int, ...], Spec], torch.Tensor | None]


def load(
    path: Path,
    engine: Engine,
    ranks: Ranks | None = None,
    target: Target = lambda keys, spec: None,
) -> tuple[int, dict[str, Any]]:
    """Read a whole checkpoint; collective if there are several ranks.

    Parameters
    ----------
    ranks: who restores together; None: this process alone.
    target: says which leaves are sharded or on a device here, whatever they were when they were
        saved. What it gives is overwritten, and undefined if this raises.

    Returns
    -------
    (step, tree): steps completed, and the state.

    Raises
    ------
    Damaged: something in it is not as it was written; names the leaves. The same in all ranks.
    OSError: it cannot be read; in other ranks that is Damaged.
    HpcftError: the ranks' shards do not make up a tensor.
    """
    return restore(path, engine, ranks or Alone(), target)


@paused()
def restore(
    path: Path,
    engine: Engine,
    ranks: Ranks,
    target: Target,
    wanted: bool = True,
    owners: Sequence[int] | None = None,
    locate: Locate | None = None,
) -> tuple[int, dict[str, Any]]:
    """Read a checkpoint whose files need not be where every rank can read them; collective.

    Parameters
    ----------
    path: of the file with the index; in every rank one.
    wanted: whether this rank wants the state; else it only reads for others.
    owners: of every file the rank that reads it; None: all ranks can read all files.
    locate: where a file is that this rank reads, by its name; None: beside the one with the index.

    Returns
    -------
    (step, tree): as :func:`load`; an empty tree if it is not wanted.

    Raises
    ------
    Damaged, OSError, HpcftError: as :func:`load`.
    """
    with ExitStack() as files:
        with _agreed(ranks, path):
            others = ranks.rank == 0 and owners is None
            checkpoint = files.enter_context(opened(path, others, locate))
            content = checkpoint.index
        with _agreed(ranks, path):
            leaves = _leaves(content, target) if wanted else {}
        pieces, spread = _pieces(ranks, content, leaves, owners)
        with _agreed(ranks, path):
            mine = reader.read_parts(checkpoint, Landing(engine), pieces)
        summed = chain.from_iterable(ranks.gather(mine))
        bad = ranks.share(reader.damage(content, summed) if ranks.rank == 0 else None)
        if bad.leaves:
            raise Damaged(
                f"damaged are {reader.told(content, bad)}", "restore another checkpoint", bad.files
            )
        spread()
        with _agreed(ranks, path):
            return checkpoint.step, _tree(content, leaves) if wanted else {}
    raise AssertionError


@paused()
def load_some(
    path: Path, engine: Engine, wanted: Callable[[str], bool], target: Target
) -> tuple[int, dict[str, Any]]:
    """Read some parts of a checkpoint, by one process; of the others nothing is read.

    Parameters
    ----------
    wanted: whether a part is, by its name.
    target: as for :func:`load`.

    Returns
    -------
    (step, tree): as :func:`load`, with None for every leaf of the other parts.

    Raises
    ------
    Damaged: something in what is wanted is not as it was written.
    OSError: it cannot be read.
    """
    with opened(path) as checkpoint:
        content = checkpoint.index
        keys = dict(tree.places(content.structure))
        leaves = _leaves(content, target, lambda number: wanted(str(keys[number][0])))
        pieces = [
            (plan.Part(i, 0, content.specs[i].nbytes), leaf.memory) for i, leaf in leaves.items()
        ]
        summed = reader.read_parts(checkpoint, Landing(engine), pieces)
        bad = reader.damage(content, summed, list(leaves))
        if bad.leaves:
            said = reader.told(content, bad)
            raise Damaged(f"damaged are {said}", "restore another checkpoint", bad.files)
        return checkpoint.step, _tree(content, leaves)


@contextmanager
def _agreed(ranks: Ranks, path: Path) -> Iterator[None]:
    """Around what may fail in this rank: what has failed in one fails in all."""
    error: Exception | None = None
    try:
        yield
    except (Damaged, OSError) as own:
        error = own
    except (ValueError, RuntimeError, MemoryError) as own:
        error = Damaged(f"the index is damaged, or memory too small: {own}")
    why = str(error).removeprefix(f"{path}: ") if error else ""
    mine = why, error.files if isinstance(error, Damaged) else ()
    found = ranks.share(ranks.gather(mine))
    reasons = list(dict.fromkeys(reason for reason, _ in found if reason))
    if files := sorted({name for _, names in found for name in names}):
        # The same in all ranks, which may do without these. An error of opening has the path.
        where = str(error).removesuffix(why) if error else ""
        said = where + "; ".join(reasons[:3])
        raise Damaged(said, "restore another checkpoint", files) from error
    if error:
        raise error
    if reasons:
        raise Damaged(reasons[0])


@dataclass(frozen=True)
class _Leaf:
    """A leaf on its way in.

    store: what becomes of it: an array or tensor, or the target it is to be in.
    memory: where its bytes, or those of its shard, are to be.
    staged: of a target, the tensor that has this memory.
    """

    store: Any
    memory: Bytes
    shard: Shard | None = None
    staged: torch.Tensor | None = None


def _leaves(
    content: Index, target: Target, wanted: Callable[[int], bool] = lambda number: True
) -> dict[int, _Leaf]:
    """Memory for the user's leaves that are wanted, by their numbers."""
    keys = dict(tree.places(content.structure))
    made = {}
    for i in filter(wanted, reader.leaves(content)):
        spec = content.specs[i]
        live = target(keys[i], spec) if spec.kind == "tensor" else None
        if live is None or tuple(live.shape) != spec.shape:
            # What does not fit is for whom the state belongs to to say.
            made[i] = _Leaf(*tree.blank(spec))
        else:
            shard = tree.shard_of(live, spec.path) if tree.is_sharded(live) else None
            staged = tree.staging(live)
            made[i] = _Leaf(live, device.flat(staged), shard, staged)
    return made


def _pieces(
    ranks: Ranks, content: Index, leaves: dict[int, _Leaf], owners: Sequence[int] | None
) -> tuple[list[tuple[plan.Part, Bytes]], Callable[[], None]]:
    """What this rank reads and where to; and what gives all ranks what they need of it."""
    specs, memories = content.specs, {i: leaf.memory for i, leaf in leaves.items()}
    if (
        ranks.size == 1
        and leaves
        and all(len(memory) == specs[i].nbytes for i, memory in memories.items())
    ):
        whole = [(plan.Part(i, 0, specs[i].nbytes), memory) for i, memory in memories.items()]
        return whole, lambda: None
    mine = {i: leaf.shard or Shard.whole(specs[i].shape) for i, leaf in leaves.items()}
    held = plan.held(specs, ranks.share(ranks.gather(mine)))
    if owners is None:
        common = plan.overlaps(specs, ranks.rank, held)
        parts = plan.share(specs, ranks.rank, ranks.size, held)
    else:
        owned = {
            leaf: [
                (owners[piece.file], plan.Part(leaf, piece.begin, piece.begin + piece.length))
                for piece in content.pieces(leaf)
            ]
            for leaf in held
        }
        common = plan.overlaps(specs, ranks.rank, held, owned=owned.__getitem__)
        parts = [p for theirs in owned.values() for owner, p in theirs if owner == ranks.rank]
    own = exchange.sections(ranks.rank, [p for p in parts if p.leaf in held], common, memories)
    pieces = [piece for section in own.values() for piece in section.pieces]
    return pieces, lambda: exchange.distribute(ranks, common, own, memories)


def _tree(content: Index, leaves: dict[int, _Leaf]) -> dict[str, Any]:
    """The state, all its bytes being there."""
    values: dict[int, Any] = {}
    for i, leaf in leaves.items():
        if leaf.staged is None:
            values[i] = tree.value(content.specs[i], leaf.store)
        else:
            tree.unstage(leaf.store, leaf.staged)
            values[i] = leaf.store
    whole = tree.unflatten(content.structure, [values.get(i) for i in range(len(content.specs))])
    if not isinstance(whole, dict):
        raise Damaged("the index is damaged: no state")
    whole.pop(OWN, None)
    return whole
