"""The job of a process that evaluates checkpoints beside a parked spare.

To the script it is as a spare's job is. ``run`` does not train: it looks for checkpoints in
--ckpt-dir and calls the script's ``evaluate`` with each new one, the newest first, until the
process is killed. It asks nothing of the ranks, and tells its shepherd what it has found.
"""

from __future__ import annotations

import math
import random
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy
import torch

from hpcft.ckpt import evaluated
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.policy import Policy
from hpcft.ckpt.restore import load_some
from hpcft.ckpt.store import Checkpoint, Store
from hpcft.errors import HpcftError
from hpcft.train.process_group import WorldProcessGroup, install
from hpcft.train.state import State
from hpcft.world import garbage
from hpcft.world.bystander import Bystander

#: What a script gives to be called with the state: metrics by name.
Evaluate = Callable[[State], Mapping[str, float]]

#: Seconds between two looks at the directory.
_LOOK = 1.0
#: Bytes through which a checkpoint is read.
_MEMORY = 64 << 20


class Evaluation:
    """This process's job; the public face is that of :class:`hpcft.train.job.Job`."""

    #: Like a spare, and like the last rank, for whatever the script does by role.
    spare = True

    def __init__(self, bystander: Bystander, seed: int) -> None:
        self._link = bystander.link
        self._options = bystander.options
        self._policy = Policy.of(bystander.options["checkpoints"])
        self._seed = seed
        self._engine = Engine(_MEMORY)
        self._tried: set[Path] = set()
        self.size = bystander.size
        self.rank = bystander.size - 1
        self.group = WorldProcessGroup(self.rank, self.size, bystander.link.progress)
        self.group.park(self.rank, self.size)
        install(self.group)

    def run(
        self, train: Callable[[State], None], state: State, evaluate: Evaluate | None = None
    ) -> NoReturn:
        """Evaluate checkpoints, for as long as this process lives."""
        garbage.as_usual()
        if evaluate is None:
            raise SystemExit(0)
        if state.sharded():
            raise HpcftError(
                "--spares-do evaluate cannot evaluate a state with shards (FSDP, tensor "
                "parallelism): a spare has but one of them",
                "leave it away, and evaluate in the training itself",
            )
        store = Store(Path(self._policy.directory))
        while True:
            checkpoint = self._next(store)
            if checkpoint is None:
                time.sleep(_LOOK)
                continue
            self._tried.add(checkpoint.path)
            try:
                self._look_at(checkpoint, state, evaluate)
            except FileNotFoundError:
                # Removed meanwhile, for there are newer ones.
                continue
            except (Damaged, OSError) as error:
                self._give_up(checkpoint, str(error))
            except HpcftError as error:
                self._give_up(checkpoint, error.line)
            except Exception as error:
                traceback.print_exc()
                self._give_up(checkpoint, f"{type(error).__name__}: {error}")

    def _next(self, store: Store) -> Checkpoint | None:
        """The newest, if it has not been tried yet."""
        try:
            newest = store.committed()[-1:]
        except OSError:
            # Next time, perhaps.
            return None
        return next((one for one in newest if one.path not in self._tried), None)

    def _give_up(self, checkpoint: Checkpoint, why: str) -> None:
        # One that is no longer wanted is written over.
        if checkpoint.path.exists():
            self._link.send("unevaluated", step=checkpoint.step, why=why)

    def _look_at(self, checkpoint: Checkpoint, state: State, evaluate: Evaluate) -> None:
        with evaluated.claimed(checkpoint.path, checkpoint.step) as claim:
            if claim is None:
                return
            began = time.monotonic()
            optimizers = {
                name
                for name, part in state.parts.items()
                if isinstance(part, torch.optim.Optimizer)
            }
            step, content = load_some(
                checkpoint.state,
                self._engine,
                lambda part: part not in optimizers,
                state.targets(),
            )
            state.from_tree(step, content, optimizers=False)
            del content
            self._seed_generators(step)
            for module in state.modules():
                module.eval()
            with torch.no_grad():
                metrics = numbers(evaluate(state))
            seconds = time.monotonic() - began
            # Told first: should this process be killed in between it is rather told twice.
            self._tell(step, metrics, seconds)
            claim.settle(metrics)
            self._draw(step, metrics)

    def _seed_generators(self, step: int) -> None:
        """So that an evaluation that draws random numbers comes to the same when it is repeated."""
        seed = random.Random(f"{self._seed} evaluation {step}").getrandbits(63)
        torch.manual_seed(seed)
        numpy.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)

    def _tell(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        # JSON knows no others.
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._link.send("evaluated", step=step, metrics=finite, seconds=round(seconds, 6))

    def _draw(self, step: int, metrics: dict[str, float]) -> None:
        if folder := self._options["tensorboard"]:
            # Few want it, and it is slow to import.
            from hpcft.train.tensorboard import write_once

            write_once(Path(folder) / "validation", step, metrics)


def numbers(found: Any) -> dict[str, float]:
    """What ``evaluate`` has returned, as numbers by name.

    Raises
    ------
    HpcftError: it is something else.
    """
    if not isinstance(found, Mapping) or not found:
        empty = found is None or isinstance(found, Mapping)
        what = "nothing" if empty else type(found).__name__
        raise HpcftError(
            f"evaluate returned {what}, and not metrics by name",
            'return something like {"loss": 0.3, "accuracy": 0.9}',
        )
    try:
        return {str(name): float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise HpcftError(
            f"evaluate returned a metric that is no number: {error}",
            "return numbers, such as loss.item()",
        ) from error
