"""Random numbers that whoever plays a rank draws alike."""

from __future__ import annotations

import random

import numpy
import torch

from hpcft.train.accelerator import in_use


class Seeds:
    """Seeds the generators of torch, numpy and random, step by step.

    Parameters
    ----------
    seed: what all random numbers of the training follow from.

    Attributes
    ----------
    used: whether a forward pass of the step that is under way has begun.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def begin(self, rank: int, step: int) -> None:
        """A step begins, in whoever plays this rank."""
        self._of_step = random.Random(f"{self._seed} {rank} {step}").getrandbits(63)
        self._apply()
        self.used = False

    def forward(self) -> None:
        """A forward pass begins."""
        # Again, for a loader that is made anew after a failure has drawn a number meanwhile.
        if not self.used:
            self.used = True
            self._apply()

    def _apply(self) -> None:
        # Not torch.manual_seed, which formats a stack trace for each accelerator not in use.
        torch.default_generator.manual_seed(self._of_step)
        if module := in_use():
            module.manual_seed_all(self._of_step)
        numpy.random.seed(self._of_step & 0xFFFFFFFF)
        random.seed(self._of_step)
