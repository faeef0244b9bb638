"""A function to be submitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def training() -> Callable[..., dict[str, Any]]:
    """A function nobody can import, as those of notebooks are."""

    def train(until: str, raises: bool = False) -> dict[str, Any]:
        """Train until a file is there, and 10 steps more."""
        import os
        import time

        import torch
        from torch.nn.parallel import DistributedDataParallel

        import hpcft

        torch.set_num_threads(1)
        job = hpcft.init()
        model = DistributedDataParallel(torch.nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        state = hpcft.State(model=model, optimizer=optimizer, last=-1, begun_at=[])

        def loop(state: hpcft.State) -> None:
            if state.step not in state.begun_at:
                state.begun_at = [*state.begun_at, state.step]
            while state.last < 0 or state.step < state.last:
                if raises and state.step == 5:
                    raise ValueError("this function is wrong")
                optimizer.zero_grad()
                model(torch.randn(8, 4)).square().mean().backward()
                # All ranks have to see the file in the same step.
                seen = torch.tensor([float(os.path.exists(until))])
                torch.distributed.all_reduce(seen)
                optimizer.step()
                if seen.item() and state.last < 0:
                    state.last = state.step + 10
                time.sleep(0.02)
                state.commit()

        job.run(loop, state)
        # What rank 0 returns is taken; that of the others is not.
        return {
            "rank": job.rank,
            "size": job.size,
            "steps": state.step,
            "begun_at": state.begun_at,
            "weight": model.module.weight.detach(),
        }

    return train
