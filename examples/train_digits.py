"""Learn to read handwritten digits, on ranks that may die at any moment.

Four ranks train, a fifth waits as a spare:

    python -m hpcft.run --nproc 4 --spares 1 examples/train_digits.py --steps 400

Kill any of the four with `kill -9 PID` (the process ids are in the run directory's ranks.json) and
the training goes on: the spare takes the dead rank's place, and the final parameters are exactly
those of a run in which nothing happened.

The lines marked with a number are what hpcft adds to an ordinary PyTorch DDP script.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import hpcft  # 1


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1797 images of 8x8 pixels that come with scikit-learn; every sixth one is for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    for_testing = torch.arange(len(labels)) % 6 == 0
    return (
        TensorDataset(images[~for_testing], labels[~for_testing]),
        TensorDataset(images[for_testing], labels[for_testing]),
    )


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on scikit-learn's digits.")
    parser.add_argument("--steps", type=int, default=400, help="steps to train (default 400)")
    parser.add_argument("--batch-size", type=int, default=16, help="samples a rank (default 16)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # With deterministic kernels "exactly the same parameters" can be checked to the last bit.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)

    # Join the others. From here on torch.distributed works, over MPI that survives failures.
    job = hpcft.init()  # 2

    training_set, test_set = digits()
    model = DistributedDataParallel(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    # Deals each epoch's samples to the ranks and remembers how far they have got together, so that
    # after a failure no sample is lost and none is seen twice.
    sampler = hpcft.ElasticBatchSampler(  # 3
        len(training_set), batch_size=args.batch_size, seed=args.seed
    )
    loader = DataLoader(training_set, batch_sampler=sampler)

    # All that a spare must know to take over. Plain values like `best` are tracked as well.
    state = hpcft.State(model=model, optimizer=optimizer, sampler=sampler, best=float("inf"))  # 4

    def train(state: hpcft.State) -> None:  # 5
        # Called again after each failure. It need not know: state.step, the sampler and the model
        # are where the last complete step left them.
        while state.step < args.steps:
            for images, labels in loader:
                loss = F.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                state.best = min(state.best, loss.item())
                state.commit(loss=loss.item())  # 6: this step is complete
                if state.step >= args.steps:
                    break

    def evaluate(state: hpcft.State) -> dict[str, float]:
        # With --spares-do evaluate a spare calls this for each new checkpoint.
        images, labels = test_set.tensors
        scores = model.module(images)
        right = (scores.argmax(dim=1) == labels).float().mean()
        return {"loss": F.cross_entropy(scores, labels).item(), "accuracy": right.item()}

    job.run(train, state, evaluate)  # 7

    if job.rank == 0:
        model.eval()
        with torch.no_grad():
            right = evaluate(state)["accuracy"]
        print(
            f"after {state.step} steps: {right:.1%} of {len(test_set)} unseen digits read correctly"
        )


if __name__ == "__main__":
    main()
