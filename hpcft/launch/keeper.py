"""Keeps this task's part in a run, through one launch of the ranks after the other.

Each launch has a world of its own, and a shepherd for its rank (:mod:`hpcft.launch.shepherd`). What
lasts is the process here, the warm process that ranks are forked from, and the channel to the other
tasks, over which they come together for the next launch (:mod:`hpcft.launch.muster`). A guest's
begins with that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpcft.errors import HpcftError
from hpcft.launch import budget
from hpcft.launch.child import adopt_orphans
from hpcft.launch.company import Company
from hpcft.launch.door import Door
from hpcft.launch.exporter import Exporter
from hpcft.launch.guest import Guest, visit
from hpcft.launch.hearth import WARM
from hpcft.launch.muster import GivenUp, Launched, LeftOut, Muster
from hpcft.launch.options import RunOptions, Sizes
from hpcft.launch.place import Task
from hpcft.launch.settings import local_settings
from hpcft.launch.shepherd import Shepherd
from hpcft.launch.warm import Warm
from hpcft.telemetry.rundir import RunDirectory
from hpcft.world.parent import die_with_parent

#: Seconds that mpiexec or srun may take to end by itself when its tasks have.
_LAUNCHER_TIME = 3.0
#: Launches in a row that may end without having come further.
_VAIN = 2
#: Launches that may come to nothing when the ranks have left to be more or fewer, all but the first
#: without those that would have joined; and how often one tries to join.
_TRIES = 3


class Keeper:
    """One task's.

    Parameters
    ----------
    settings: environment variables for the rank.
    sizes: how many ranks train.
    folder: for mpiexec's own files.
    """

    def __init__(
        self,
        options: RunOptions,
        task: Task,
        settings: Mapping[str, str],
        sizes: Sizes,
        folder: Path,
    ) -> None:
        self._options = options
        self._task = task
        self._settings = dict(settings)
        self._sizes = sizes
        self._folder = folder
        self._rundir = RunDirectory(options.run_dir)
        #: The step to which any rank had come, and how many launches have not come further.
        self._furthest, self._vain = 0, 0
        #: What lends the rank its place in MPI, and what has started that, in all launches but the
        #: first.
        self._ticket: socket.socket | None = None
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._exporter = Exporter(options)

    async def run(self) -> int:
        """Look after the task's rank until the run is over.

        Returns
        -------
        The exit code to leave with.
        """
        place = self._task.place
        here = local_settings(self._task.number_here, self._task.ranks_here)
        environ = {**os.environ, **self._settings, **here}
        log = self._rundir.log_file(place.rank)
        if not self._task.launched_by_us:
            # A former run's. Who has launched us has seen to it, and may do so again in this run.
            log.unlink(missing_ok=True)
        with self._warmed(log):
            shepherd = Shepherd(
                self._options,
                self._task,
                place,
                environ,
                self._sizes,
                self._warm,
                self._exporter,
            )
            await shepherd.run()
            return await self._follow(1, shepherd)

    async def join(self, party: str, of: int) -> int:
        """Have a rank of this task's be of the run's next launch, and so on.

        Parameters
        ----------
        party, of: the name of those it comes with, and how many they are.

        Returns
        -------
        The exit code to leave with.

        Raises
        ------
        HpcftError: the run has ended, or nobody answers for it.
        """
        former: Door | None = None
        with self._warmed(self._folder / "guest.log"):
            for _ in range(_TRIES):
                guest, door = await visit(self._rundir, former)
                # Nobody is to wait for what can be done before.
                self._warm.learn(door.modules)
                await self._warm.ready()
                place = self._task.place
                guest.announce(
                    "guest", guest.rank, host=place.host, job=place.job, party=party, of=of
                )
                try:
                    code = await self._enter(door.launch, guest)
                except LeftOut:
                    # It came too late for the launch after that; there is another door soon.
                    former = door
                    continue
                if code is not None:
                    return code
                # The launch it was a guest of has ended; there may be another.
            raise HpcftError(
                f"the run in {self._rundir.path} goes on without this process, {_TRIES} times",
                "see its events.jsonl, and start it with --verbose 2 to see why",
            )

    @contextlib.contextmanager
    def _warmed(self, log: Path) -> Iterator[None]:
        die_with_parent(signal.SIGTERM)
        adopt_orphans()
        # Without LOCAL_RANK, which may be another in the next launch.
        environ = {**os.environ, **self._settings}
        shared = Path(os.environ[WARM]) if self._task.launched_by_us else None
        self._warm = Warm(self._options.command, self._options.preload, environ, log, shared)
        try:
            yield
        finally:
            self._exporter.close()
            self._warm.kill()
            self._warm.flush()

    async def _enter(self, number: int, guest: Guest) -> int | None:
        """Come to a launch after launch ``number`` as a guest, and go on as one of its ranks.

        Returns
        -------
        The exit code of the run; None if this guest has not come to a launch.

        Raises
        ------
        LeftOut: there is one without it.
        """
        with_guests = True
        try:
            while True:
                number += 1
                try:
                    shepherd = await self._next(number, guest, None, False, with_guests)
                except GivenUp as error:
                    await guest.leave()
                    if isinstance(error, LeftOut):
                        raise
                    if self._options.verbose:
                        print(f"hpcft: not joined: {error}", file=sys.stderr, flush=True)
                    return error.code
                with_guests = False
                if shepherd is None:
                    if guest.gone:
                        return None
                    continue
                code = await shepherd.run()
                if shepherd.fleet:
                    return await self._follow(number, shepherd)
                if not shepherd.again:
                    return code
        finally:
            await self._let_go()

    async def _follow(self, number: int, last: Shepherd) -> int:
        """After launch ``number``, look after its rank in the launches to come, if there are any.

        Parameters
        ----------
        last: the shepherd of that launch, whose ranks have met, and which is over.

        Returns
        -------
        The exit code of the run.
        """
        given_up: tuple[int, str] | None = None
        again = last.again
        #: How often the next was tried since the last whose ranks have met.
        tries = 0
        try:
            while again:
                number += 1
                resized = last.outcome.resizes and tries < _TRIES
                assert last.fleet is not None
                try:
                    shepherd = await self._next(number, last.fleet, last, resized, tries == 0)
                except GivenUp as error:
                    given_up = error.code, str(error)
                    break
                tries += 1
                if shepherd is None:
                    continue
                code = await shepherd.run()
                again = shepherd.again
                if shepherd.fleet:
                    last, tries = shepherd, 0
                elif not again:
                    given_up = code, shepherd.outcome.why()
            return await last.conclude(given_up)
        finally:
            await self._let_go()

    async def _next(
        self,
        number: int,
        company: Company,
        last: Shepherd | None,
        resized: bool,
        with_guests: bool,
    ) -> Shepherd | None:
        """Come to launch ``number`` with the others.

        Parameters
        ----------
        company: who they are.
        last: the shepherd of the last launch whose ranks have met; None for a guest.
        resized: that launch has ended for nothing else.
        with_guests: whether these are to be of it.

        Returns
        -------
        The shepherd for it; None if it has come to nothing.

        Raises
        ------
        GivenUp: there is none.
        """
        await self._let_go()
        muster = Muster(
            number,
            self._task,
            company,
            last.step if last else -1,
            partial(self._decide, last, resized),
            self._folder,
            with_guests,
        )
        try:
            launched = await muster.run()
        except (OSError, ValueError, asyncio.TimeoutError) as error:
            if self._options.verbose >= 2:
                rank = self._task.place.rank
                print(f"hpcft: rank {rank}: {error}", file=sys.stderr, flush=True)
            return None
        finally:
            self._launchers = muster.launchers
            if not resized:
                self._vain = 0 if muster.furthest > self._furthest else self._vain + 1
                self._furthest = max(self._furthest, muster.furthest)
        self._ticket = launched.ticket
        return self._shepherd(number, launched, company, last)

    def _shepherd(
        self, number: int, launched: Launched, company: Company, last: Shepherd | None
    ) -> Shepherd:
        self._warm.revive()
        self._warm.log_to(self._rundir.log_file(launched.rank))
        here = local_settings(launched.number_here, launched.ranks_here)
        return Shepherd(
            self._options,
            self._task,
            replace(self._task.place, rank=launched.rank, size=launched.size),
            {**launched.environ, **self._settings, **here},
            self._sizes,
            self._warm,
            self._exporter,
            number,
            company,
            launched.ticket,
            last.lost if last else frozenset(),
        )

    def _decide(
        self, last: Shepherd | None, resized: bool, step: int, hosts: dict[int, str]
    ) -> None:
        """Whether there is to be another launch; called in the lowest shepherd, for all.

        Parameters
        ----------
        resized: the last has ended for nothing else.

        Raises
        ------
        GivenUp: there is none.
        """
        assert last is not None
        assert last.fleet is not None
        if resized:
            last.farewell.resized(last.fleet, step, hosts)
            return
        outcome, most = last.outcome, self._options.max_relaunch
        why, code, raised = outcome.why(), outcome.code, outcome.raised()
        events = self._rundir.events()
        if objection := budget.objection(events, most):
            raise GivenUp(code, f"{why}; {objection}")
        if len(hosts) < self._options.min_ranks:
            raise GivenUp(
                code,
                f"{why}; {len(hosts)} are left to relaunch, of at least "
                f"{self._options.min_ranks} (--min-ranks)",
            )
        vain = self._vain + 1 if step <= self._furthest else 0
        if vain > _VAIN or (vain and raised is not None):
            if raised is not None:
                print(self._rundir.last_traceback(raised), file=sys.stderr, flush=True)
            again = f"; no launch comes further than step {step}" if budget.lately(events) else ""
            raise GivenUp(code, why + again)
        last.farewell.relaunched(last.fleet, step, hosts)
        if self._options.verbose:
            said = budget.announcement(events, most, len(hosts), why)
            print(said, file=sys.stderr, flush=True)

    async def _let_go(self) -> None:
        """Give back a place in MPI, and end what has lent it."""
        ticket, launchers = self._ticket, self._launchers
        self._ticket, self._launchers = None, []
        if ticket:
            ticket.close()
        # Its tasks end when all have been given back, and its daemons with it.
        deadline = time.monotonic() + _LAUNCHER_TIME
        for launcher in launchers:
            while launcher.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM)
