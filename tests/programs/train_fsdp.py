"""A small training whose parameters and optimizer state are sharded (FSDP2).

``--tensor-parallel N`` cuts the first layers over N ranks before that, on a mesh of two dimensions;
``--replicas N`` has N groups of ranks with the same shards (HSDP). Every rank says when it has
built its model, and which step it has completed.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

import hpcft


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--width", type=int, default=300)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds of sleep in a step")
    parser.add_argument("--until", default="", metavar="FILE", help="no pace once this is there")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--on-shrink", default="keep-lr")
    parser.add_argument(
        "--dump", metavar="FILE", help="where rank 0 puts what training starts with"
    )
    parser.add_argument("--raise-at", type=int, default=-1, help="every rank 1 raises in this step")
    parser.add_argument(
        "--die-anew",
        type=int,
        default=-1,
        help="process that dies when it is run for a second time",
    )
    args = parser.parse_args()
    # Modules stay imported when a script is run anew.
    times = sys.__dict__.setdefault("times_run", [])
    times.append(time.time())
    process = int(os.environ.get("PMIX_RANK", 0))

    torch.set_num_threads(1)
    torch.manual_seed(1)
    job = hpcft.init(on_shrink=args.on_shrink)
    data = TensorDataset(torch.randn(960, 64), torch.randint(0, 5, (960,)))
    # Sizes that the number of ranks does not divide, leaves of less and more than 64 KiB.
    model = nn.Sequential(
        nn.Linear(64, args.width), nn.ReLU(), nn.Linear(args.width, 64), nn.ReLU()
    )
    model.append(nn.Linear(64, 5))
    tensor_group = None
    if args.tensor_parallel > 1:
        shape = (job.size // args.tensor_parallel, args.tensor_parallel)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
        parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        tensor_group = mesh["model"].get_group()
        mesh = mesh["data"]
    elif args.replicas > 1:
        shape = (args.replicas, job.size // args.replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh("cpu", (job.size,))
    if len(times) == 2 and process == args.die_anew:
        os.kill(os.getpid(), signal.SIGKILL)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sampler = hpcft.ElasticBatchSampler(len(data), batch_size=8)
    loader = DataLoader(data, batch_sampler=sampler)
    state = hpcft.State(model=model, optimizer=optimizer, sampler=sampler, seen=0)

    former = sum(type(thing) is hpcft.State for thing in gc.get_objects()) - 1
    print(f"built rank {job.rank} size {job.size}, {former} states before it", flush=True)

    def whole(value: object) -> object:
        return value.full_tensor() if isinstance(value, DTensor) else value

    def train(state: hpcft.State) -> None:
        if args.dump:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]}
            parts = tree_map(whole, parts)
            if job.rank == 0:
                torch.save(parts, args.dump)
        while state.step < args.steps:
            for inputs, targets in loader:
                if tensor_group:
                    # They compute one thing together.
                    dist.broadcast(inputs, group=tensor_group, group_src=0)
                    dist.broadcast(targets, group=tensor_group, group_src=0)
                if state.step == args.raise_at and job.rank == 1 and not job.spare:
                    raise ValueError("this script is wrong")
                loss = F.cross_entropy(model(inputs), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state.seen += len(inputs)
                if not (args.until and os.path.exists(args.until)):
                    time.sleep(args.pace)
                state.commit(loss=loss.item())
                print(f"step {state.step} rank {job.rank} size {job.size}", flush=True)
                if state.step >= args.steps:
                    break

    job.run(train, state)


if __name__ == "__main__":
    main()
