"""A training whose steps take a process as long as it has samples, some longer than others.

What it comes to does not depend on who has which samples of a batch, but for rounding: a linear
model, its loss the mean over the batch. Every rank says which samples it has seen in which step;
rank 0 what the parameters are at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import hpcft


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--slow-process", type=int, default=-1, help="takes three times as long")
    parser.add_argument("--workers", type=int, default=0, help="of each loader; they read ahead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    job = hpcft.init()
    size = 16 * 40 + 5
    inputs = torch.randn(size, 8, dtype=torch.float64)
    data = TensorDataset(torch.arange(size), inputs, inputs.sum(1, keepdim=True))
    model = DistributedDataParallel(nn.Linear(8, 1).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = hpcft.ElasticBatchSampler(len(data), batch_size=8, drop_last=False)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=args.workers)
    state = hpcft.State(model=model, optimizer=optimizer, sampler=sampler)
    slow = int(os.environ.get("PMIX_RANK", 0)) == args.slow_process

    def train(state: hpcft.State) -> None:
        while sampler.epoch < args.epochs:
            for numbers, features, targets in loader:
                # Before the others can have completed the step with what this rank gives them.
                seen = " ".join(map(str, numbers.tolist()))
                if not job.spare:
                    # In one piece, for others write to the same log.
                    line = f"samples of step {state.step} epoch {sampler.epoch}: {seen}\n"
                    sys.stdout.write(line)
                    sys.stdout.flush()
                time.sleep(len(numbers) * (0.006 if slow else 0.002))
                loss = nn.functional.mse_loss(model(features), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state.commit(loss=loss.item())

    job.run(train, state)
    if job.rank == 0:
        found = torch.cat([part.detach().flatten() for part in model.parameters()])
        print("parameters", *found.tolist(), flush=True)


if __name__ == "__main__":
    main()
