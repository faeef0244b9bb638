"""Coming together for a relaunch: who is left, whether it is worth it, and a new world for them.

When a world cannot heal its ranks are all ended, but their shepherds stand, and the channel between
them does. Each says that it is ready for another launch; the lowest decides, and has mpiexec or
srun start one small task for each (:mod:`hpcft.launch.ticket`), from which each shepherd gets the
place in MPI of its next rank. Further facts of the channel (see :mod:`hpcft.launch.fleet`)::

    ready N    a shepherd: its rank of launch N - 1 has ended; a guest: it only waits
    launch N   the lowest shepherd: these are the ranks of launch N
    failed N   a shepherd: launch N has come to nothing
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcft.errors import INTERRUPTED, HpcftError
from hpcft.launch import daemons, openmpi, ticket
from hpcft.launch.channel import Message, of_this_user
from hpcft.launch.company import Company
from hpcft.launch.daemons import Daemons, without_mpi
from hpcft.launch.place import Task
from hpcft.slurm.step import overlapping

#: Seconds between the first shepherd that is ready and the last.
_READY_TIME = 20.0
#: Seconds in which the task that lends its place must come.
_TICKET_TIME = 60.0
#: What makes a process a task of a launch, and of one only.
_IDENTITY = ("PMIX_", "PRTE_", "OMPI_")


@dataclass(frozen=True)
class Launched:
    """A shepherd's place in the next launch.

    rank, size: of its rank there.
    number_here, ranks_here: its number among those on its node, and how many there are.
    environ: the rank's environment.
    ticket: the connection to the task that lends the place; closed, it is given back.
    """

    rank: int
    size: int
    number_here: int
    ranks_here: int
    environ: dict[str, str]
    ticket: socket.socket


class GivenUp(Exception):
    """There is no other launch.

    Parameters
    ----------
    code: the exit code of the run.
    reason: in words.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class LeftOut(GivenUp):
    """There is one, and without this shepherd."""


class Muster:
    """This shepherd's part in coming to launch ``number``.

    Parameters
    ----------
    company: the shepherds of the last world that was, and guests.
    step: how far this shepherd's rank had come.
    decide: called in the lowest shepherd with the step that the furthest rank had come to, and
        where the shepherds are that are left, by rank; raises GivenUp.
    folder: for mpiexec's own files.
    with_guests: whether these are to be ranks; what has failed may have failed for one of them.
    """

    def __init__(
        self,
        number: int,
        task: Task,
        company: Company,
        step: int,
        decide: Callable[[int, dict[int, str]], None],
        folder: Path,
        with_guests: bool,
    ) -> None:
        self._number = number
        self._with_guests = with_guests
        self._task = task
        self._company = company
        self._step = step
        self._decide = decide
        self._folder = folder
        self._news = asyncio.Event()
        self._daemons: Daemons | None = None
        #: mpiexec or srun, and the former's daemon on this node.
        self.launchers: list[subprocess.Popen[bytes]] = []

    @property
    def furthest(self) -> int:
        """The step that the furthest rank had come to."""
        return max(int(fact["step"]) for fact in self._ready.values())

    async def run(self) -> Launched:
        """Come to the next launch.

        Raises
        ------
        GivenUp: there is none.
        """
        name = f"hpcft-{secrets.token_hex(12)}"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("\0" + name)
            listening.listen(8)
            listening.setblocking(False)
            self._company.on_fact = lambda fact: self._news.set()
            self._company.announce(
                f"ready {self._number}", self._company.rank, ticket=name, step=self._step
            )
            members = await self._await_launch()
            if self._company.rank not in members:
                code = 0 if self._company.rank in self._company.known("retire") else 4
                raise LeftOut(code, "the others go on without this rank")
            try:
                return await self._take_ticket(listening, members)
            except (OSError, ValueError, asyncio.TimeoutError):
                self._company.announce(f"failed {self._number}", self._company.rank)
                raise
            finally:
                if self._daemons:
                    self._daemons.close()

    @property
    def _hosts(self) -> dict[int, str]:
        return {**self._company.hosts, **self._company.guests()}

    @property
    def _ready(self) -> dict[int, Message]:
        return self._company.said(f"ready {self._number}")

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        self._news.clear()

    async def _await_launch(self) -> list[int]:
        """The ranks that make up the next world, in order."""
        deadline = float("inf")
        while not (launch := self._company.said(f"launch {self._number}")):
            self._check_end()
            ready, expected = self._ready.keys(), self._company.expected()
            if not self._with_guests:
                expected &= self._company.standing()
            standing = self._company.standing()
            # Guests are ready long before.
            if ready & standing and deadline == float("inf"):
                deadline = time.monotonic() + _READY_TIME
            late = time.monotonic() > deadline
            staying = standing - self._company.retiring()
            if not staying:
                raise GivenUp(INTERRUPTED, "all ranks were to leave")
            lowest = min(staying)
            if lowest == self._company.rank and (expected <= ready or late):
                await self._call(sorted(expected & ready))
                continue
            if time.monotonic() > deadline + _READY_TIME:
                raise GivenUp(4, "the other shepherds do not answer")
            await self._wait(0.1)
        return _members(launch)

    def _check_end(self) -> None:
        for said in self._company.said("end").values():
            raise GivenUp(said["code"], said["reason"])
        if self._company.fenced:
            raise GivenUp(4, "this node is cut off from the others")
        if self._company.gone:
            raise ConnectionError("the shepherd that this guest was connected to is gone")

    async def _call(self, members: list[int]) -> None:
        """Decide for all, and start what lends them their places."""
        try:
            known, ready = self._hosts, self._ready
            hosts = {rank: known[rank] for rank in members}
            self._decide(self.furthest, hosts)
            names = [ready[rank]["ticket"] for rank in members]
            self.launchers.append(await self._start(hosts, names))
        except (OSError, HpcftError, GivenUp) as error:
            code = error.code if isinstance(error, GivenUp) else 1
            self._company.announce("end", self._company.rank, code=code, reason=str(error))
            raise GivenUp(code, str(error)) from error
        self._company.announce(f"launch {self._number}", self._company.rank, members=members)

    def _across(self, members: Iterable[int]) -> bool:
        """Whether they are in several Slurm jobs, or some outside of them all."""
        return len({self._company.job(rank) for rank in members}) > 1

    async def _start(self, hosts: dict[int, str], names: list[str]) -> subprocess.Popen[bytes]:
        tasks = [sys.executable, "-ISE", ticket.__file__, *names]
        environ = without_mpi(os.environ)
        if self._across(hosts):
            self._daemons = Daemons(self._company, self._number, hosts, self._folder)
            shell = await self._daemons.listen()
            where = list(hosts.values())
            command = openmpi.command_across(
                openmpi.find_mpiexec(), where, self._folder, shell, self._task.interface
            )
        elif self._task.step:
            file = self._folder / f"hosts-{self._number}"
            file.write_text("".join(f"{host}\n" for host in hosts.values()))
            command = overlapping(len(hosts))
            environ["SLURM_HOSTFILE"] = str(file)
            # Else srun believes that the job has no nodes but those of the step this is a task of.
            nodes = sorted({*hosts.values()})
            environ["SLURM_JOB_NODELIST"] = environ["SLURM_NODELIST"] = ",".join(nodes)
            environ["SLURM_JOB_NUM_NODES"] = environ["SLURM_NNODES"] = str(len(nodes))
        else:
            command = openmpi.command(openmpi.find_mpiexec(), len(hosts), self._folder)
        return subprocess.Popen(
            [*command, *tasks],
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _take_ticket(self, listening: socket.socket, members: list[int]) -> Launched:
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + _TICKET_TIME
        accepting = asyncio.ensure_future(loop.sock_accept(listening))
        try:
            while not accepting.done():
                self._check(deadline)
                self._start_daemon()
                await asyncio.wait({accepting}, timeout=0.1)
            connection, _ = accepting.result()
        finally:
            accepting.cancel()
        try:
            environ = _merged(os.environ, await _lent(connection), self._across(members))
        except BaseException:
            connection.close()
            raise
        me, hosts = self._company.rank, self._hosts
        here = [rank for rank in members if hosts[rank] == hosts[me]]
        return Launched(
            members.index(me),
            len(members),
            here.index(me),
            len(here),
            environ,
            connection,
        )

    def _start_daemon(self) -> None:
        """Start mpiexec's daemon on this node, if this shepherd is the one to do that."""
        # Where mpiexec is it needs none.
        if self.launchers:
            return
        if daemon := daemons.start(self._company, self._number, self._folder):
            self.launchers.append(daemon)

    def _check(self, deadline: float) -> None:
        """Raise if this launch has come to nothing."""
        self._check_end()
        if problem := undone(self._company, self._number):
            raise ConnectionError(problem)
        if time.monotonic() > deadline:
            raise ConnectionError(f"nothing has lent a place for {_TICKET_TIME:g} s")


def undone(company: Company, number: int) -> str:
    """Why launch ``number``, which was called, comes to nothing; empty if it may come to something.

    Those who are to leave before the one after it are in it all the same.
    """
    if company.said(f"failed {number}"):
        return "another shepherd is lost, or its rank did not start"
    members = set(_members(company.said(f"launch {number}")))
    if not members <= company.standing() | company.guests().keys():
        return "a shepherd has been lost meanwhile"
    return ""


def _members(launch: dict[int, Message]) -> list[int]:
    # There are two if the first to call has been lost meanwhile; the other will not come far.
    members: list[int] = launch[max(launch)]["members"]
    return members


async def _lent(connection: socket.socket) -> dict[str, str]:
    """The environment of the task at the other end."""
    loop = asyncio.get_running_loop()
    if not of_this_user(connection):
        raise ConnectionError("another user's process wants to be a rank of this run")
    text = b""
    while not text.endswith(b"\n"):
        part = await asyncio.wait_for(loop.sock_recv(connection, 1 << 20), _TICKET_TIME)
        if not part:
            raise ConnectionError("the task that lends its place has ended")
        text += part
    environ: dict[str, str] = json.loads(text)
    return environ


def _merged(own: Mapping[str, str], lent: Mapping[str, str], across: bool) -> dict[str, str]:
    """This task's environment, with another's place in MPI.

    Parameters
    ----------
    across: that was lent by mpiexec for several Slurm jobs, of which this task remains in its own.
    """
    identity = _IDENTITY if across else (*_IDENTITY, "SLURM_")
    mine = {name: value for name, value in own.items() if not name.startswith(identity)}
    theirs = {name: value for name, value in lent.items() if name.startswith(identity)}
    return mine | theirs
