"""The front end for one machine: starts the shepherds with mpiexec."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from hpcft.ckpt.near import NearStore
from hpcft.errors import UsageError, shell_code
from hpcft.launch import budget, openmpi
from hpcft.launch.child import (
    adopt_orphans,
    children,
    descendants,
    exit_status,
)
from hpcft.launch.hearth import WARM, Hearth
from hpcft.launch.options import RunOptions, check_sizes
from hpcft.launch.place import prefix_of_wheel
from hpcft.launch.register import register
from hpcft.launch.scratch import scratch
from hpcft.launch.settings import rank_settings
from hpcft.launch.upload import Upload, require_writable
from hpcft.telemetry.events import Event
from hpcft.telemetry.rundir import RunDirectory
from hpcft.telemetry.summary import summarise
from hpcft.world.parent import die_with_parent
from hpcft.world.versions import known_problem

#: Seconds mpiexec has to end by itself after it was asked to.
_PATIENCE = 8.0
#: What people and launchers end a run with.
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(options: RunOptions, argv: list[str]) -> int:
    """Start ``--nproc`` and ``--spares`` ranks on this machine and wait for their end.

    Nothing of the run is left behind when this returns, nor when this process is killed.

    Parameters
    ----------
    argv: the command line, which every shepherd reads again.

    Returns
    -------
    The run's exit code.

    Raises
    ------
    UsageError: there is no MPI that could do it.
    """
    if options.nproc is None and options.spares:
        raise UsageError("--spares is given without --nproc", "say how many ranks are to train")
    tasks = (options.nproc or 1) + options.spares
    check_sizes(options, tasks, "hpcft")
    mpi = openmpi.find()
    openmpi.require_fault_tolerance(mpi)
    openmpi.require_mpi4py(mpi)
    if options.verbose and (problem := known_problem(mpi.version)):
        print(f"hpcft: warning: {problem}", file=sys.stderr)
    require_places(options)
    create_run_directory(options, 0, "")
    register(options, argv)
    again = [sys.executable, "-m", "hpcft.run", "--run-dir", str(options.run_dir), *argv]
    environ = {**os.environ, "HPCFT_LAUNCHER": str(os.getpid())}
    if sys.stderr.isatty():
        environ["HPCFT_TERMINAL"] = "1"
    rundir = options.rundir
    # The table is made when training begins.
    launcher = _Launcher(lambda: options.checkpoints is not None and rundir.ranks_file.exists())
    objection = ""
    while not objection:
        with scratch() as folder:
            command = [*openmpi.command(mpi.mpiexec, tasks, folder), *again]
            settings = rank_settings(prefix_of_wheel(os.environ), tasks, None, folder)
            # What is forked from it shows this environment, and by it whose it is.
            told = {"HPCFT_RUN": json.dumps({"run_dir": str(options.run_dir)})}
            warm = {**os.environ, **settings, **told}
            hearth = Hearth(options.command, options.preload, warm, folder)
            code = launcher.run(command, {**environ, WARM: str(folder)}, hearth)
        if not code or launcher.asked or not _lost(rundir):
            break
        objection = _relaunch(options, rundir, _reason(code), tasks)
    if launcher.asked and code - 128 in _ENDS and options.checkpoints:
        # mpiexec leaves the shepherds no time for it.
        for tier in options.checkpoints.near:
            NearStore(Path(tier.path)).clear_all()
    _tell_of_failure(rundir, code, objection)
    if options.upload:
        launcher.upload(Upload(options.run_dir, options.upload, not options.verbose))
    if not code and rundir.failed():
        return 3
    return code


def require_places(options: RunOptions) -> None:
    """See that what the run serves and uploads it can, before anything else is touched.

    Raises
    ------
    UsageError: it cannot.
    """
    if options.metrics:
        options.metrics.require_free("--metrics-port")
    if options.upload:
        require_writable(options.upload)


def create_run_directory(options: RunOptions, tasks: int, launch: str) -> None:
    """Make the run directory of a launch.

    Raises
    ------
    UsageError: it cannot be made.
    """
    try:
        RunDirectory(options.run_dir).create(tasks, launch)
    except OSError as error:
        raise UsageError(
            f"the run directory cannot be made: {error}", "give another --run-dir"
        ) from error


class _Launcher:
    """Runs mpiexec, and knows who wants the run to end.

    Parameters
    ----------
    can_leave: whether the ranks train, and would save before they end.
    """

    def __init__(self, can_leave: Callable[[], bool]) -> None:
        self._can_leave = can_leave
        self._process: subprocess.Popen[bytes] | None = None
        #: The signals that warned of the run's end, and were to end it in order or at once.
        self._warned: list[int] = []
        self._wished: list[int] = []
        self._asked: list[int] = []
        self._upload: Upload | None = None
        adopt_orphans()
        for number in (*_ENDS, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._signalled)

    @property
    def asked(self) -> bool:
        """Whether somebody wants the run to end."""
        return bool(self._asked or self._wished or self._warned)

    def run(self, command: list[str], environ: dict[str, str], hearth: Hearth) -> int:
        """Start a command and wait for its end.

        Parameters
        ----------
        hearth: what its tasks have their ranks forked from; ends with it.

        Returns
        -------
        Its exit code; 128 and the number of a signal that has ended it or was to.
        """
        self._process = process = subprocess.Popen(
            command,
            env=environ,
            # Ctrl-C reaches this process alone, which knows what to do about it.
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),
        )
        deadline: float | None = None
        tasks = _Tasks(process.pid)
        while True:
            try:
                code = process.wait(0.1 if deadline is None and not self._asked else 0.5)
                break
            except subprocess.TimeoutExpired:
                hearth.tend()
                _take_in_others(process.pid, hearth.pid)
                if (self._asked or tasks.over(time.monotonic())) and deadline is None:
                    deadline = time.monotonic() + _PATIENCE
                if deadline and time.monotonic() > deadline:
                    process.kill()
        hearth.put_out()
        _clear_up()
        # By the signal that was passed on, or by what mpiexec ends the others with.
        signalled = code in (128 + signal.SIGUSR1, 128 + signal.SIGTERM)
        if self._asked or (self._wished and signalled):
            return 128 + (self._asked or self._wished)[0]
        if code < 0 and deadline:
            return tasks.code
        return shell_code(code)

    def upload(self, upload: Upload) -> None:
        """Have the run, which is over, be uploaded, unless somebody wants all to end at once."""
        if len(self._wished) + len(self._asked) > 1:
            upload.skip("as the run was ended at once")
            return
        self._upload = upload
        upload.start()
        upload.wait()

    def _signalled(self, number: int, _: FrameType | None) -> None:
        if self._upload:
            if number in _ENDS:
                self._upload.stop()
            return
        # mpiexec passes it on to the shepherds, and they to the ranks. Asked twice, it is killed.
        if number not in _ENDS:
            self._warned.append(number)
            self._pass_on(number)
        elif self._can_leave() and not self._wished:
            self._wished.append(number)
            self._pass_on(signal.SIGUSR1)
        else:
            self._asked.append(number)
            # The shepherds would take the first SIGTERM for a wish, and mpiexec kills them soon.
            self._pass_on(signal.SIGTERM if len(self._asked) == 1 else signal.SIGKILL)

    def _pass_on(self, number: int) -> None:
        if self._process:
            self._process.send_signal(number)


class _Tasks:
    """What mpiexec has started, for it has been seen to lock itself out as the last of them ended.

    (Open MPI 5.0.9: prterun's main thread waits for a mutex for ever, two tasks not taken in.)

    Attributes
    ----------
    code: the highest exit code of those seen to have ended.
    """

    def __init__(self, mpiexec: int) -> None:
        self._mpiexec = mpiexec
        self._seen = False
        self._next_look = 0.0
        self.code = 0

    def over(self, now: float) -> bool:
        """Whether there were some, and all have ended. Looks every two seconds."""
        if now < self._next_look:
            return False
        self._next_look = now + 2
        statuses = [exit_status(pid) for pid in children(self._mpiexec)]
        ended = [status for status in statuses if status is not None]
        codes = [os.waitstatus_to_exitcode(status) for status in ended]
        self.code = max(self.code, *map(shell_code, codes), 0)
        self._seen = self._seen or len(ended) < len(statuses)
        return self._seen and len(ended) == len(statuses)


def _lost(rundir: RunDirectory) -> bool:
    """Whether a run that trained has lost its shepherds, if nobody wanted it to end.

    mpiexec's end may leave them the time to save.
    """
    summary = rundir.summary()
    return bool(rundir.events()) and (not summary or summary["result"] == "interrupted")


def _reason(code: int) -> str:
    return f"mpiexec ended with exit code {code}, and with it all shepherds"


def _relaunch(options: RunOptions, rundir: RunDirectory, reason: str, tasks: int) -> str:
    """Note that all is started again, from outside and cold.

    The shepherds would have done it from warm processes, and are lost with them.

    Returns
    -------
    Why it is not; empty if it is.
    """
    events = rundir.events()
    if objection := budget.objection(events, options.max_relaunch):
        return objection
    step = max(event.step for event in events)
    detail = {"reason": reason, "hosts": [os.uname().nodename]}
    rundir.summary_file.unlink(missing_ok=True)
    rundir.append([Event("relaunch", step, tuple(range(tasks)), detail=detail)])
    if options.verbose:
        said = budget.announcement(events, options.max_relaunch, tasks, reason)
        print(said, file=sys.stderr)
    return ""


def _tell_of_failure(rundir: RunDirectory, code: int, objection: str) -> None:
    """Sum up a run whose shepherds could not, as mpiexec was killed and they with it."""
    events = rundir.events()
    if not code or not events or rundir.summary_file.exists():
        return
    reason = "; ".join(filter(None, (_reason(code), objection)))
    print(f"hpcft: the run has failed: {reason}", file=sys.stderr)
    step = max(event.step for event in events)
    rundir.append([Event("failed", step, detail={"reason": reason})])
    rundir.write_summary(summarise(rundir.events()))


def _take_in_others(*awaited: int) -> None:
    """Take in children that have ended, their own or orphans, but for those awaited elsewhere."""
    while (ended := _ended_child()) and ended not in awaited:
        os.waitpid(ended, 0)


def _ended_child() -> int:
    """A child that has ended and was not taken in; 0 if there is none."""
    with contextlib.suppress(ChildProcessError):
        if found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return found.si_pid
    return 0


def _clear_up() -> None:
    """Kill what is left below this process, and take it in."""
    deadline = time.monotonic() + 2
    while left := descendants(os.getpid()):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM)
            except ProcessLookupError:
                pass
        _take_in_others()
        time.sleep(0.01)
