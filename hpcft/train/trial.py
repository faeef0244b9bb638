"""``python -m hpcft.run --spares 1 -m hpcft.train.trial``: the shortest training with a loss.

A line is fitted in 30 steps. At step 10 the last rank kills itself with SIGKILL, and the spare is
to take its place; whether it did is in the run's summary.
"""

from __future__ import annotations

import os
import signal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from hpcft.train.api import init
from hpcft.train.sampler import ElasticBatchSampler
from hpcft.train.state import State

_STEPS = 30
_LAST_STEP_OF_VICTIM = 10


def main() -> None:
    """Train, and lose a rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    job = init()
    inputs = torch.linspace(-1, 1, 256)[:, None]
    data = TensorDataset(inputs, 3 * inputs + 1)
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = ElasticBatchSampler(len(data), batch_size=4)
    state = State(model=model, optimizer=optimizer, sampler=sampler)
    # The spare comes to be the last rank as well; it must not follow the first one's example.
    victim = not job.spare and job.rank == job.size - 1

    def train(state: State) -> None:
        while state.step < _STEPS:
            for x, y in DataLoader(data, batch_sampler=sampler):
                if victim and state.step == _LAST_STEP_OF_VICTIM:
                    os.kill(os.getpid(), signal.SIGKILL)
                loss = torch.nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                state.commit(loss=loss.item())
                if state.step >= _STEPS:
                    break

    job.run(train, state)


if __name__ == "__main__":
    main()
