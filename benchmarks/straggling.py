"""The training of benchmarks/backup.py: a small language model on ranks some of which are slow.

What a rank computes takes as long as is drawn for it, for which it sleeps, so that more ranks than
there are processors can be compared; forward and backward pass come on top of that.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import hpcft

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_lm import LanguageModel, Passages, encode, standard_library, width_for

TEXT, HELD_OUT = 400_000, 500


def data() -> tuple[Subset[tuple[Tensor, Tensor]], Subset[tuple[Tensor, Tensor]]]:
    """What is learnt from, and what is held out."""
    passages = Passages(encode(standard_library(TEXT)))
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(passages, order[HELD_OUT:]), Subset(passages, order[:HELD_OUT])


def model(parameters: int) -> LanguageModel:
    """The same at every start."""
    torch.manual_seed(0)
    return LanguageModel(width_for(parameters), dropout=0.0)


class Pace:
    """How long a rank takes for its part of a step, in seconds.

    kind: ``even``; ``slow``: the last rank takes ten times as long for a third of its steps;
        ``tail``: every rank's time has a heavy tail (Pareto, with this exponent).
    """

    def __init__(self, kind: str, base: float, exponent: float, rank: int, ranks: int) -> None:
        self._kind, self._base, self._exponent = kind, base, exponent
        self._slow = rank == ranks - 1
        self._chance = random.Random(rank)

    def draw(self) -> float:
        if self._kind == "tail":
            return self._base * self._chance.paretovariate(self._exponent)
        slow = self._kind == "slow" and self._slow and self._chance.random() < 1 / 3
        return self._base * (10 if slow else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--params", type=float, default=5e4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--pace", choices=("even", "slow", "tail"), default="even")
    parser.add_argument("--base", type=float, default=0.15, help="seconds")
    parser.add_argument("--exponent", type=float, default=1.5)
    parser.add_argument("--every", type=int, default=10, help="keep the parameters so often")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    job = hpcft.init()
    learnt, _ = data()
    net = DistributedDataParallel(model(int(args.params)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    sampler = hpcft.ElasticBatchSampler(len(learnt), args.batch_size)
    loader = DataLoader(learnt, batch_sampler=sampler)
    state = hpcft.State(model=net, optimizer=optimizer, sampler=sampler)
    pace = Pace(args.pace, args.base, args.exponent, job.rank, job.size)
    kept = [0]

    def train(state: hpcft.State) -> None:
        while state.step < args.steps:
            for text, following in loader:
                time.sleep(pace.draw())
                loss = F.cross_entropy(net(text).flatten(0, 1), following.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state.commit(loss=loss.item())
                if job.rank == 0:
                    with (args.out / "stamps").open("a") as stamps:
                        stamps.write(f"{state.step} {time.time():.4f}\n")
                    if state.step // args.every > kept[0]:
                        kept[0] = state.step // args.every
                        torch.save(net.module.state_dict(), args.out / f"{state.step}.pt")
                if state.step >= args.steps:
                    break

    job.run(train, state)


if __name__ == "__main__":
    main()
