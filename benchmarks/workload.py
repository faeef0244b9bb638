"""The training that the benchmarks run: the same model and steps under hpcft and under torchrun.

Under ``python -m hpcft.run`` it is a job of hpcft's. Started by torchrun it is an ordinary script:
gloo, and a checkpoint by rank 0 every ``--save-every`` steps, from which a restarted one goes on.
Rank 0 notes the end of every step in the file ``--stamps``: step, time, process number. With
``--everybody`` all ranks do. With ``--stages`` each process notes in another file when it has come
to which stage of its start: number, stage, time.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peers import born
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LAYERS = 8


def network(parameters: int) -> nn.Module:
    width = round((parameters / LAYERS) ** 0.5)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers)


def dataset(file: str) -> Tensor:
    """What is in the file, as a training wants it: in floating point, each example normalised."""
    examples = torch.from_numpy(np.load(file)).float()
    return (examples - examples.mean(1, keepdim=True)) / examples.std(1, keepdim=True)


def stage(name: str, at: float | None = None) -> None:
    """Note that this process has come so far, if there is a file to note it in."""
    if STAGES:
        with open(STAGES, "a") as file:
            file.write(f"{os.getpid()} {name} {at or time.time():.6f}\n")


#: The file.
STAGES = ""


class Workload:
    """Model, optimizer and one training step."""

    def __init__(self, parameters: int, batch: int, data: str = "") -> None:
        self._data = dataset(data) if data else None
        stage("dataset")
        torch.manual_seed(0)
        self.model = DistributedDataParallel(network(parameters), gradient_as_bucket_view=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        stage("model")
        width = self.model.module[0].in_features
        self._inputs = torch.randn(batch, width)

    def forward(self) -> Tensor:
        loss: Tensor = self.model(self._inputs).square().mean()
        return loss

    def step(self) -> None:
        loss = self.forward()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Stamps:
    """Notes the end of steps, if there is a file to note it in."""

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._fd = os.open(path, flags, 0o644)

    def add(self, step: int) -> None:
        os.write(self._fd, f"{step} {time.time():.6f} {os.getpid()}\n".encode())


def under_hpcft(args: argparse.Namespace) -> None:
    import hpcft

    job = hpcft.init()
    workload = Workload(args.params, args.batch, args.data)
    state = hpcft.State(model=workload.model, optimizer=workload.optimizer)
    stamps = Stamps(args.stamps)

    def train(state: hpcft.State) -> None:
        if not job.spare:
            stage("parameters")
        while state.step < args.steps:
            time.sleep(args.pace)
            workload.step()
            state.commit()
            if (job.rank == 0 or args.everybody) and not job.spare:
                stamps.add(state.step)

    def evaluate(state: hpcft.State) -> dict[str, float]:
        Path(args.evaluate).touch()
        while True:
            workload.forward()

    job.run(train, state, evaluate if args.evaluate else None)


def under_torchrun(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    stage("communicator")
    workload = Workload(args.params, args.batch, args.data)
    stamps = Stamps(args.stamps)
    step = 0
    checkpoint = Path(args.checkpoint)
    if args.save_every and checkpoint.exists():
        saved = torch.load(checkpoint)
        workload.model.module.load_state_dict(saved["model"])
        workload.optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    stage("parameters")
    while step < args.steps:
        time.sleep(args.pace)
        workload.step()
        step += 1
        if dist.get_rank() == 0:
            stamps.add(step)
            if args.save_every and step % args.save_every == 0:
                aside = checkpoint.with_suffix(".new")
                saved = {
                    "model": workload.model.module.state_dict(),
                    "optimizer": workload.optimizer.state_dict(),
                    "step": step,
                }
                torch.save(saved, aside)
                aside.replace(checkpoint)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=10e6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--stamps", required=True)
    parser.add_argument("--pace", type=float, default=0, help="seconds a step waits for its data")
    parser.add_argument("--everybody", action="store_true", help="all ranks note their steps")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--evaluate", default="", help="make this file, and evaluate for ever")
    parser.add_argument("--data", default="", help="a file of examples to hold")
    parser.add_argument("--stages", default="", help="note the stages of the start in this file")
    parser.add_argument("--dataset", action="store_true", help="load one before all else")
    args = parser.parse_args()
    global STAGES
    STAGES = args.stages
    if STAGES:
        # What the first optimizer would import.
        importlib.import_module("torch._dynamo")
    stage("process", born(os.getpid()))
    stage("libraries")
    torch.set_num_threads(1)
    if args.dataset:
        importlib.import_module("dataset")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        under_torchrun(args)
    else:
        under_hpcft(args)


if __name__ == "__main__":
    main()
