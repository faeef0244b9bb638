"""Train from a script, or a notebook, as a job of submitit, and wait for what comes of it.

    python examples/submit.py                   here, on 2 ranks and 1 spare
    python examples/submit.py --nodes 3         in Slurm, a rank on each of three nodes, one a spare

The function below is called in every rank. Should a rank or a node fail, the training heals; should
the job's time be over, or Slurm take it away, it is requeued and goes on from its checkpoint.
"""

from __future__ import annotations

import argparse

import submitit

import hpcft.submitit


def train(steps: int, lr: float) -> dict[str, float]:
    """Fit a line; what rank 0 returns is the job's result."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import hpcft

    torch.manual_seed(0)
    job = hpcft.init()
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    state = hpcft.State(model=model, optimizer=optimizer)

    def loop(state: hpcft.State) -> None:
        while state.step < steps:
            x = torch.rand(64, 1)
            loss = torch.nn.functional.mse_loss(model(x), 3 * x + 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state.commit(loss=loss.item())

    job.run(loop, state)
    return {"slope": model.module.weight.item(), "offset": model.module.bias.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train as a job of submitit.")
    parser.add_argument("--nodes", type=int, default=1, help="more than one need Slurm (default 1)")
    parser.add_argument("--folder", default="jobs", help="seen by all nodes (default jobs)")
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()

    executor = submitit.AutoExecutor(
        folder=args.folder, cluster="slurm" if args.nodes > 1 else "local"
    )
    executor.update_parameters(timeout_min=10, **hpcft.submitit.allocation(args.nodes))
    ranks = max(3, args.nodes)
    job = executor.submit(
        hpcft.submitit.Job(train, nproc=ranks - 1, spares=1), steps=args.steps, lr=0.5
    )
    print(f"job {job.job_id}; look at it with: hpcft top {args.folder}/{job.job_id}_run")
    print(job.result())


if __name__ == "__main__":
    main()
