"""A training whose parameters tell what they have learnt from: there is one for each sample.

The loss is the mean of a batch's parameters, and the learning rate 1. So a step over n samples
takes 1/n from the parameter of each.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import hpcft


class Tally(nn.Module):
    def __init__(self, samples: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(samples, dtype=torch.float64))

    def forward(self, batch: Tensor) -> Tensor:
        return self.weights[batch].mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--missing", type=int, nargs="*", default=[], help="late in these steps")
    parser.add_argument("--collective", action="store_true", help="call one in the loop")
    parser.add_argument("--unused", action="store_true", help="find_unused_parameters")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    job = hpcft.init()
    model = DistributedDataParallel(Tally(args.samples), find_unused_parameters=args.unused)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sampler = hpcft.ElasticBatchSampler(args.samples, args.batch)
    loader = DataLoader(range(args.samples), batch_sampler=sampler)
    state = hpcft.State(model=model, optimizer=optimizer, sampler=sampler)
    last = job.rank == job.size - 1 and not job.spare

    def train(state: hpcft.State) -> None:
        while sampler.epoch < args.epochs:
            for batch in loader:
                if last and state.step in args.missing:
                    # Long enough for the others to make the step, and wait for nothing then.
                    while not Path(os.environ["GO_ON"]).exists():
                        time.sleep(0.01)
                loss = model(batch)
                optimizer.zero_grad()
                loss.backward()
                if args.collective:
                    dist.all_reduce(loss.detach())
                optimizer.step()
                state.commit()
                print(f"step {state.step} rank {job.rank}", flush=True)
                if sampler.epoch >= args.epochs:
                    break

    job.run(train, state)
    if job.rank == 0:
        torch.save((state.step, model.module.weights.detach()), args.out)


if __name__ == "__main__":
    main()
