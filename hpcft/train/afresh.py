"""Torch as a script finds it that begins, in a process in which one has run before."""

from __future__ import annotations

import functools
import gc
import random
import sys

import numpy
import torch
import torch.distributed as dist

from hpcft.train.accelerator import in_use


def forget() -> None:
    """Take back what a script and :func:`hpcft.train.process_group.install` have made of torch.

    The process groups go, their names are free, and names are given out from the first again.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_meshes()
    if "torch._dynamo" in sys.modules:
        # Compiled code can hold groups, and shapes of another rank's shards.
        torch._dynamo.reset()
    # A script that wants to know its random numbers seeds them.
    torch.default_generator.seed()
    if module := in_use():
        module.seed_all()
    random.seed()
    numpy.random.seed()


def _forget_meshes() -> None:
    """Clear what torch has worked out for DTensors on the meshes of before.

    Found in torch 2.13: a mesh that is made anew equals, and hashes as, the one of the same shape
    made before, whatever rank of it this process has been and is. Sharding propagation (a cache in
    C++, one in Python) and redistribution remember, for equal meshes, results that hold the former
    mesh, and so its coordinates: those of the rank that this process was. For a survivor they are
    right, and its former groups' names lead to the new ones; a spare, which was built as the last
    rank, would cut tensors as that. Meshes of another shape find nothing. The stack of
    ``with mesh`` (``_mesh_resources``) is unwound with the script.
    """
    for cache in gc.get_objects():
        # Not isinstance, at which an object of torch.distributed warns that it is deprecated.
        if type(cache) is functools._lru_cache_wrapper:
            module = getattr(cache, "__module__", None) or ""
            if module.startswith("torch.distributed."):
                cache.cache_clear()
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear:
        clear()
    redistribute = sys.modules.get("torch.distributed.tensor._redistribute")
    planners = getattr(redistribute, "clear_redistribute_planner_cache", None)
    if planners:
        planners()
