"""Tensors and states as the ranks of a mesh have them, without such ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from hpcft.ckpt.spec import Spec


def cut(
    whole: torch.Tensor, mesh: tuple[int, ...], placements: Sequence[Placement], rank: int
) -> DTensor:
    """A tensor as a rank of a mesh has it; cut by PyTorch."""
    ranks = torch.arange(math.prod(mesh)).reshape(mesh)
    device_mesh = DeviceMesh("cpu", ranks, _init_backend=False, _rank=rank)
    mine = whole
    for placement, count, place in zip(placements, mesh, np.unravel_index(rank, mesh), strict=True):
        if not isinstance(placement, Replicate):
            pieces, _ = placement._split_tensor(mine, count, with_padding=False)
            mine = pieces[int(place)]
    meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
    spec = DTensorSpec(device_mesh, tuple(placements), meta)
    return DTensor(mine.clone(), spec, requires_grad=False)


#: Shapes with the cuts FSDP, tensor parallelism, both, and HSDP make of them.
LEAVES = {
    "even": (512, 64),
    "uneven": (1001, 37),
    "few": (3, 30_000),
    "small": (50,),
    "wide": (64, 600),
    "deep": (6, 128, 50),
}


def state(mesh: tuple[int, ...], placements: Sequence[Placement] | None, rank: int) -> Any:
    """A state, as a rank has it; sharded if placements are given."""
    generator = torch.Generator().manual_seed(5)
    model: dict[str, Any] = {}
    for name, shape in LEAVES.items():
        whole = torch.randn(shape, generator=generator)
        fits = [
            p if isinstance(p, Replicate) or p.dim < len(shape) else Shard(0)
            for p in placements or ()
        ]
        model[name] = cut(whole, mesh, fits, rank) if placements else whole
    model["replicated"] = torch.randn(300, 100, generator=generator).bfloat16()
    return {"model": model, "values": {"seen": 7, "text": "abc", "none": None}}


def blank(tree_: Any) -> Any:
    """The DTensors of a state, without their content."""

    def target(keys: tuple[str | int, ...], spec: Spec) -> Any:
        found = tree_
        for key in keys:
            found = found[key]
        if isinstance(found, DTensor):
            found.to_local().zero_()
            return found
        return None

    return target
