"""``--upload``: at the end of a run ``hpcft upload``, in a process of its own.

That knows fsspec and what the URL needs besides; whoever starts it stays small.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from hpcft.errors import UsageError
from hpcft.launch import command

#: Seconds within which it has to show whether the URL can be written to.
_TRIAL_TIME = 60.0
_PERIOD = 0.1


def place(url: str) -> str:
    """A URL, or a directory by its whole path.

    Raises
    ------
    UsageError: it is empty.
    """
    if not url:
        raise UsageError("--upload '' is no URL", "give a directory, or something like s3://b")
    return url if "://" in url else str(Path(url).absolute())


def require_writable(url: str) -> None:
    """See that the URL can be written to, by writing to it.

    Raises
    ------
    UsageError: it cannot.
    """
    try:
        trial = subprocess.run(
            [sys.executable, "-m", "hpcft.watch.upload", url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=_TRIAL_TIME,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"--upload {url} does not answer", "check the URL") from error
    if trial.returncode:
        cause, _, remedy = trial.stdout.strip().partition("\n")
        raise UsageError(f"--upload {url} cannot be written to: {cause}", remedy)


class Upload:
    """Of one run, at its end.

    Parameters
    ----------
    quiet: only errors are said.
    """

    def __init__(self, run_dir: Path, url: str, quiet: bool) -> None:
        self._run_dir = run_dir
        self._url = url
        self._quiet = quiet
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def start(self) -> None:
        """Begin."""
        words = ["upload", str(self._run_dir), self._url]
        self._process = command.start(words, self._quiet, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for its end."""
        assert self._process is not None
        self._process.wait()
        if self._stopped:
            self.skip("as the run was ended")

    async def finish(self, limit: float | None) -> None:
        """Do all of it, letting others work meanwhile.

        Parameters
        ----------
        limit: seconds that there are for it; None: as many as it takes.
        """
        self.start()
        assert self._process is not None
        deadline = None if limit is None else time.monotonic() + limit
        while self._process.poll() is None:
            if deadline is not None and time.monotonic() > deadline and not self._stopped:
                self.stop()
            await asyncio.sleep(_PERIOD)
        if self._stopped:
            self.skip("for lack of time" if limit is not None else "as the run was ended")

    def stop(self) -> None:
        """End it at once."""
        self._stopped = True
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def skip(self, why: str) -> None:
        """Say that it is not done, and how to do it."""
        print(
            f"hpcft: not uploaded, {why}; the run is kept in {self._run_dir}; to do it: "
            f"hpcft upload {self._run_dir} {self._url}",
            file=sys.stderr,
            flush=True,
        )
