"""What the nodes do not keep for each other is soon in the directory."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import torch
from training import wait_for

import hpcft
from hpcft.ckpt.lock import Lock
from hpcft.ckpt.near import Tier
from hpcft.ckpt.policy import Policy, Retention
from hpcft.train.checkpoints import Checkpoints
from hpcft.world.link import Link
from hpcft.world.progress import Progress


class Training:
    """One rank that saves near it after every second step, and to the directory hardly ever."""

    def __init__(self, folder: Path) -> None:
        self.why = ""
        self.told: list[tuple[str, int]] = []
        self._shepherd, theirs = socket.socketpair()
        self._shepherd.setblocking(False)
        self._heard = b""
        self._link = Link(theirs, Progress.create())
        (folder / "saved").mkdir()
        policy = Policy(
            *(str(folder / "saved"), 10**6, False, Retention(3), 16 << 20, 0, False, 60.0),
            near=(Tier(2, False, str(folder / "near")),),
        )
        self._checkpoints = Checkpoints(
            policy,
            Lock(folder / "saved", "a test", "test"),
            self._tell,
            contextlib.nullcontext,
            self._link,
        )
        self.state = hpcft.State(model=torch.nn.Linear(4, 4))
        self._checkpoints.attach_alone(None, self.state, saves=True)

    def _tell(self, kind: str, step: int, detail: dict[str, Any]) -> None:
        self.told.append((kind, step))

    @property
    def durable(self) -> list[int]:
        """The steps in the directory."""
        return [step for kind, step in self.told if kind == "checkpoint"]

    def step(self) -> int:
        self.state.__dict__["step"] += 1
        self._checkpoints.edge(self.state, {})
        with contextlib.suppress(BlockingIOError):
            self._heard += self._shepherd.recv(1 << 16)
        *lines, self._heard = self._heard.split(b"\n")
        for message in map(json.loads, lines):
            if message["kind"] == "copy":
                self._link.copied[message["checkpoint"]] = self.why
        return self.state.step


def test_copies_that_cannot_be_made_are_made_up_for_once_each_time(tmp_path: Path) -> None:
    training = Training(tmp_path)
    wait_for("steps with copies", lambda: training.step() > 50)
    assert not training.durable
    training.why = "memory is short"
    wait_for("a checkpoint", lambda: training.step() and training.durable)
    until = training.state.step + 50
    wait_for("steps without copies", lambda: training.step() > until)
    assert len(training.durable) == 1
    training.why = ""
    wait_for("steps with copies again", lambda: training.step() > until + 50)
    training.why = "memory is short"
    wait_for("another checkpoint", lambda: training.step() and len(training.durable) == 2)
