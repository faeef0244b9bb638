"""A rank's connection to its shepherd, from the rank's side.

Messages are JSON objects, one a line, over a socket pair. The shepherd tells of deaths; a thread
here passes each on to the MPI library (:mod:`hpcft.world.notify`) and wakes who waits for news.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from hpcft.world.cohort import Cohorts
from hpcft.world.departure import Departures
from hpcft.world.progress import Progress

#: Environment variables by which the shepherd hands its rank the two descriptors.
LINK_FD = "HPCFT_LINK_FD"
PROGRESS_FD = "HPCFT_PROGRESS_FD"
#: And by which the warm process is handed the socket over which it is asked for ranks, and told
#: what to preload, and which process has started it.
CONTROL_FD = "HPCFT_CONTROL_FD"
PRELOAD = "HPCFT_PRELOAD"
STARTED_BY = "HPCFT_STARTED_BY"
#: Has a rank write the stacks of all its threads to its log.
STACKS_SIGNAL = signal.SIGRTMIN + 6


@dataclass(frozen=True)
class Failure:
    """A process that failed, as the shepherds know it.

    rank: world rank.
    cause: in words; empty as long as it is not known.
    at: when it failed, as far as is known; seconds since 1970.
    known: when this rank was told.
    """

    rank: int
    cause: str
    at: float
    known: float


class Link:
    """The rank's end of the connection.

    ``news`` is set whenever a failure has become known; who waits on it clears it. ``copied`` has
    the names of the checkpoints of which the shepherd has made copies on another node, with why it
    could not, if so. ``departures`` knows whether all are to leave, ``cohorts`` whose gradients
    make a step. ``slow`` tells whether this process is slower than the others, and ``probe`` is set
    when, as a spare, it is to find out; ``bare`` tells whether, as a spare, it is to hold no more
    than it needs to be there, and ``tight`` whether its machine has no memory to spare. ``drained``
    has what a spare says it has written, until somebody takes it out.
    """

    def __init__(self, sock: socket.socket, progress: Progress) -> None:
        self._socket = sock
        self._reader = sock.makefile("r")
        self._lock = threading.Lock()
        self.progress = progress
        self.slow = False
        self.bare = self.tight = False
        self.probe = threading.Event()
        self.news = threading.Event()
        self.failures: dict[int, Failure] = {}
        self.copied: dict[str, str] = {}
        self.drained: list[dict[str, Any]] = []
        #: What came before this process could act on it.
        self._early: list[dict[str, Any]] = []
        self.departures = Departures(progress, self._at)
        self.cohorts = Cohorts(self.send)

    @classmethod
    def inherited(cls) -> Link | None:
        """The link this process was started with, or None when it has no shepherd."""
        if LINK_FD not in os.environ:
            return None
        # Taken out of the environment: a subprocess of the rank has no part in the link.
        sock = socket.socket(fileno=int(os.environ.pop(LINK_FD)))
        page = int(os.environ.pop(PROGRESS_FD))
        for fd in (sock.fileno(), page):
            os.set_inheritable(fd, False)
        return cls(sock, Progress(page))

    def send(self, kind: str, **fields: object) -> None:
        """Tell the shepherd something."""
        with self._lock:
            self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def _at(self, purpose: str, epoch: int, step: int) -> None:
        self.send("at", purpose=purpose, epoch=epoch, step=step)

    def receive(self) -> dict[str, Any]:
        """The shepherd's next message; only before :meth:`listen`.

        Raises
        ------
        EOFError: the shepherd is gone.
        """
        line = self._reader.readline()
        if not line:
            raise EOFError("the shepherd has closed its link")
        message: dict[str, Any] = json.loads(line)
        return message

    def await_ready(self) -> None:
        """Wait until the shepherds are connected; of who dies meanwhile :meth:`listen` tells.

        Raises
        ------
        EOFError: the shepherd is gone.
        """
        while (message := self.receive())["kind"] != "ready":
            self._early.append(message)

    def failure(self, rank: int, patience: float) -> Failure | None:
        """What is known of the failure of ``rank``, waiting up to ``patience`` seconds for it.

        MPI can have told of a failure before the shepherd's message has been read.
        """
        deadline = time.monotonic() + patience
        while rank not in self.failures and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.failures.get(rank)

    def listen(self, on_failure: Callable[[int], None]) -> None:
        """Start the thread that takes news from now on.

        Parameters
        ----------
        on_failure: called in that thread with the world rank of every process that failed,
            before anybody waiting on ``news`` is woken.
        """

        def run() -> None:
            for message in chain(self._early, map(json.loads, self._reader)):
                if message["kind"] == "copied":
                    self.copied[message["checkpoint"]] = message["why"]
                    continue
                if message["kind"] == "drained":
                    self.drained.append(message)
                    continue
                if message["kind"] == "cohort":
                    self.cohorts.told(message)
                    continue
                if message["kind"] == "leave":
                    departure = self.departures.of(message["purpose"])
                    departure.ask(message["reason"], message["durable"])
                    continue
                if message["kind"] == "replace":
                    worlds = frozenset(message["worlds"])
                    self.departures.replacement.want(message["epoch"], worlds)
                    continue
                if message["kind"] == "slow":
                    self.slow = message["slow"]
                    continue
                if message["kind"] == "warmth":
                    self.bare = message["bare"]
                    self.news.set()
                    continue
                if message["kind"] == "room":
                    self.tight = message["tight"]
                    continue
                if message["kind"] == "probe":
                    self.probe.set()
                    self.news.set()
                    continue
                if message["kind"] == "until":
                    departure = self.departures.of(message["purpose"])
                    departure.settled(message["epoch"], message["step"])
                    continue
                rank, cause = message["rank"], message["cause"]
                if message["kind"] == "cause":
                    self.failures[rank] = replace(self.failures[rank], cause=cause)
                else:
                    self.failures[rank] = Failure(rank, cause, message["at"], known=time.time())
                    on_failure(rank)
                    self.news.set()

        threading.Thread(target=run, name="hpcft-link", daemon=True).start()
