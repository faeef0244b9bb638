"""Processes forked from a warm process, and what their shepherd hears of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from training import wait_for

from hpcft.launch import hearth as hearths
from hpcft.launch.hearth import Hearth
from hpcft.launch.link import Link
from hpcft.launch.reaper import take_in
from hpcft.launch.warm import Fork, Warm
from hpcft.world.progress import Progress, shepherd_of

SCRIPT = """
import os, signal, sys
print("begun", os.environ["WHO"], flush=True)
if os.environ["WHO"] == "leaver":
    sys.exit(7)
signal.pause()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A socket's address would be too short for it.
    folder = tmp_path_factory.mktemp("warm") / ("long" * 30)
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def hearth(folder: Path) -> Iterator[Hearth]:
    hearth = Hearth([str(folder / "script.py")], (), os.environ, folder)
    yield hearth
    hearth.put_out()


class Shepherd:
    """As much of one as forks processes."""

    def __init__(self, folder: Path, shared: bool) -> None:
        self.log = folder / f"log-{os.getpid()}"
        self.log.unlink(missing_ok=True)
        self.warm = Warm(
            [str(folder / "script.py")], (), os.environ, self.log, folder if shared else None
        )

    async def fork(self, who: str) -> Fork:
        """A process that runs the script, and has come to it."""
        link, page = await Link.create(), Progress.create()
        told = json.dumps({"bystander": {"ranks": 1, "runs": []}})
        environ = {**os.environ, "HPCFT_RUN": told, "WHO": who}
        fork = await self.warm.fork(environ, (link.theirs.fileno(), page.fd))
        link.theirs.close()
        begun = f"begun {who}\n"
        await asyncio.to_thread(wait_for, begun, lambda: begun in self.log.read_text())
        return fork


@pytest.fixture
def shepherd(hearth: Hearth, folder: Path) -> Iterator[Shepherd]:
    shepherd = Shepherd(folder, shared=True)
    yield shepherd
    shepherd.warm.flush()


def within_a_minute(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_shepherd_hears_of_stops_and_of_the_end(shepherd: Shepherd) -> None:
    async def test() -> None:
        fork = await shepherd.fork("sleeper")
        assert shepherd_of(fork.pid) == os.getpid()
        news = fork.news()
        for number, heard in [
            (signal.SIGSTOP, os.WIFSTOPPED),
            (signal.SIGCONT, os.WIFCONTINUED),
            (signal.SIGSEGV, os.WIFSIGNALED),
        ]:
            os.kill(fork.pid, number)
            assert heard(await anext(news))
        assert [status async for status in news] == []
        last = [status async for status in (await shepherd.fork("leaver")).news()]
        assert [os.waitstatus_to_exitcode(status) for status in last] == [7]

    within_a_minute(test())


def test_who_loses_its_minder_ends(shepherd: Shepherd) -> None:
    async def test() -> None:
        fork = await shepherd.fork("sleeper")
        minder = psutil.Process(fork.pid).parent()
        assert minder is not None
        assert minder.name() == "hpcft-minder"
        # As signals that are sent to all processes of a job do not end it.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            minder.send_signal(number)
        assert not gone(fork.pid)
        minder.kill()
        assert [status async for status in fork.news()] == [signal.SIGKILL]
        wait_for("the end", lambda: gone(fork.pid))

    within_a_minute(test())


#: Has processes forked, tells their numbers, and waits.
ANOTHER = """
import asyncio, signal, sys
from pathlib import Path
from test_warm import Shepherd
async def main():
    shepherd = Shepherd(Path(sys.argv[1]), shared=True)
    print((await shepherd.fork("sleeper")).pid, (await shepherd.fork("sleeper")).pid, flush=True)
    signal.pause()
asyncio.run(main())
"""


def test_what_is_forked_ends_with_its_shepherd_and_not_with_the_warm_process(
    hearth: Hearth, shepherd: Shepherd, folder: Path
) -> None:
    async def test() -> None:
        ours = await shepherd.fork("sleeper")
        here = Path(__file__).parent
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(here)])}
        command = [sys.executable, "-c", ANOTHER, str(folder)]
        another = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE)
        assert another.stdout is not None
        theirs = [int(pid) for pid in another.stdout.readline().split()]
        former = hearth.pid
        os.kill(former, signal.SIGKILL)
        # What is asked meanwhile is not lost.
        asked = asyncio.ensure_future(shepherd.fork("another"))
        while hearth.pid == former:
            await asyncio.sleep(0.01)
            hearth.tend()
        await asked
        assert not any(map(gone, [ours.pid, *theirs]))
        another.kill()
        another.communicate()
        wait_for("their end", lambda: all(map(gone, theirs)))
        assert not gone(ours.pid)

    within_a_minute(test())


def test_who_is_wanted_no_more_does_not_begin(shepherd: Shepherd, hearth: Hearth) -> None:
    async def test() -> None:
        # It waits for its turn behind another.
        os.kill(hearth.pid, signal.SIGSTOP)
        asked = asyncio.ensure_future(shepherd.fork("unwanted"))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        os.kill(hearth.pid, signal.SIGCONT)
        await shepherd.fork("wanted")
        assert "unwanted" not in shepherd.log.read_text()

    within_a_minute(test())


def test_nobody_waits_for_one_that_always_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(1)\n")
    monkeypatch.setattr(hearths, "_VAIN_TIME", 60.0)
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    hearth = Hearth(["script.py"], (), environ, tmp_path)
    shepherd = Shepherd(tmp_path, shared=True)

    async def test() -> None:
        asked = asyncio.ensure_future(shepherd.fork("sleeper"))
        while not asked.done():
            hearth.tend()
            await asyncio.sleep(0.01)
        with pytest.raises(ProcessLookupError):
            await asked

    within_a_minute(test())
    hearth.put_out()


def test_a_shepherd_may_have_one_of_its_own(folder: Path) -> None:
    async def test() -> None:
        shepherd = Shepherd(folder, shared=False)
        warm = shepherd.warm
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, take_in, warm)
        first = await shepherd.fork("first")
        warm.kill()
        with pytest.raises(ProcessLookupError):
            await shepherd.fork("none")
        assert not gone(first.pid)
        warm.revive()
        second = await shepherd.fork("second")
        for fork in (first, second):
            os.kill(fork.pid, signal.SIGKILL)
            assert [status async for status in fork.news()] == [signal.SIGKILL]
        warm.kill()
        warm.flush()

    within_a_minute(test())
