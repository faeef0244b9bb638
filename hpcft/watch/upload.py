"""Copying what a run leaves to another place, by any URL that fsspec knows.

``python -m hpcft.watch.upload URL`` tries whether URL can be written to.
"""

from __future__ import annotations

import os
import posixpath
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.registry import known_implementations
from tenacity import RetryCallState, Retrying, retry_if_not_exception_type, wait_exponential

from hpcft.ckpt.errand import Errand
from hpcft.telemetry.rundir import RunDirectory

#: Stores of objects, which have no directories to be made.
_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "r2"})
#: Seconds from an attempt that failed to the next: at first, and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0
#: Seconds beyond its patience that an attempt is waited for.
_ATTEMPT_TIME = 5.0
#: Errors that another attempt meets as well.
_FINAL = (ImportError, NotImplementedError, TypeError, ValueError)
#: Seconds within which it shows whether a place can be written to.
_TRIAL_TIME = 30.0
_PERIOD = 0.1


@dataclass(frozen=True)
class Item:
    """A file to be uploaded.

    name: path within the run directory, with slashes.
    """

    name: str
    path: Path
    bytes: int


def items(rundir: RunDirectory) -> list[Item]:
    """What a run leaves, logs last.

    That is what hpcft writes, but not ``door.json``, which holds a secret, nor checkpoints; what
    else the user has put there is left alone.

    Raises
    ------
    OSError: it cannot be read.
    """
    files = (rundir.summary_file, rundir.events_file, rundir.ranks_file, rundir.status_file)
    folders = (rundir.laps_folder, rundir.tensorboard_folder, rundir.path / "logs")
    return [
        Item(path.relative_to(rundir.path).as_posix(), path, path.stat().st_size)
        for path in (*files, *(path for folder in folders for path in _below(folder)))
        if path.is_file()
    ]


def _below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink() and not path.name.startswith("."):
            yield path


class Upload:
    """Of some files, to one place.

    Parameters
    ----------
    url: directory that they go to, by their names.
    patience: seconds without anything being done after which it has failed: so long attempts are
        repeated, and so long one is waited for.

    Attributes
    ----------
    moved, total: bytes.
    """

    def __init__(self, files: list[Item], url: str, patience: float) -> None:
        self._files = files
        self._url = url
        self._patience = patience
        self._done = 0
        self.moved = 0
        self.total = sum(item.bytes for item in files)
        self._last = time.monotonic()
        self._why: BaseException | None = None
        #: Seconds until the next attempt, when one has failed.
        self._pause = 0.0

    def run(self, progress: Callable[[int, int], None], failed: Callable[[str], None]) -> None:
        """Do it.

        Parameters
        ----------
        progress: told now and then the bytes moved, and those in all.
        failed: told why an attempt has failed, if there is to be another.

        Raises
        ------
        OSError: it cannot be done, whatever the reason.
        """
        self._failed = failed
        working = Errand(self._work)
        while not working.done:
            progress(self.moved, self.total)
            if time.monotonic() - self._last > self._patience + self._pause + _ATTEMPT_TIME:
                why = self._why or TimeoutError("it does not answer")
                raise OSError(f"nothing was done for {self._patience:g} s: {_told(why)}")
            time.sleep(_PERIOD)
        try:
            working.result()
        except Exception as error:
            raise OSError(_told(error)) from error
        progress(self.moved, self.total)

    def _work(self) -> None:
        for item in self._files:
            repeated = Retrying(
                wait=wait_exponential(_FIRST_WAIT, max=_LONGEST_WAIT),
                stop=self._is_enough,
                retry=retry_if_not_exception_type(_FINAL),
                before_sleep=self._note,
                reraise=True,
            )
            repeated(self._put, item)
            self._done += item.bytes
            self._at(self._done)

    def _put(self, item: Item) -> None:
        filesystem, place = _filesystem(self._url)
        target = f"{place}/{item.name}"
        if not _OBJECTS & _protocols(filesystem):
            filesystem.makedirs(posixpath.dirname(target), exist_ok=True)
        filesystem.put_file(str(item.path), target, callback=_Mover(self._at, self._done))

    def _at(self, moved: int) -> None:
        self.moved, self._last = min(moved, self.total), time.monotonic()

    def _is_enough(self, _: RetryCallState) -> bool:
        return time.monotonic() - self._last > self._patience

    def _note(self, state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        self._pause = state.next_action.sleep
        self._why = state.outcome.exception()
        assert self._why is not None
        self._failed(_told(self._why))


class _Mover(Callback):  # type: ignore[misc]
    """Told by fsspec of the bytes of one file that were moved."""

    def __init__(self, at: Callable[[int], None], before: int) -> None:
        super().__init__()
        self._at, self._before = at, before

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._at(self._before + self.value)


def require_writable(url: str) -> None:
    """Write something there, and remove it.

    Raises
    ------
    OSError: that cannot be done, whatever the reason.
    """
    try:
        Errand(lambda: _try_out(url)).result(_TRIAL_TIME)
    except Exception as error:
        raise OSError(_told(error)) from error


def _try_out(url: str) -> None:
    filesystem, place = _filesystem(url)
    if not _OBJECTS & _protocols(filesystem):
        filesystem.makedirs(place, exist_ok=True)
    trial = f"{place}/.hpcft-trial-{secrets.token_hex(4)}"
    filesystem.pipe_file(trial, b"trial")
    filesystem.rm_file(trial)


def _filesystem(url: str) -> tuple[Any, str]:
    filesystem, place = fsspec.core.url_to_fs(url)
    return filesystem, place.rstrip("/")


def _protocols(filesystem: Any) -> set[str]:
    protocol = filesystem.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def _told(error: BaseException) -> str:
    """In a line."""
    return " ".join(str(error).split()) or type(error).__name__


def _remedy(url: str) -> str:
    """What may help where nothing can be written."""
    protocol, separator, _ = url.partition("://")
    if separator and protocol not in known_implementations:
        return "give a directory, or a URL that begins with s3://, gs://, sftp://, file://, ..."
    package = known_implementations.get(protocol, {"class": "fsspec"})["class"].partition(".")[0]
    if find_spec(package) is None:
        return f"pip install {package}"
    return "check the URL, and the keys that it needs"


def main() -> int:
    """Try the URL given, and say what is wrong and what may help; return the exit code."""
    url = sys.argv[1]
    try:
        require_writable(url)
    except OSError as error:
        print(error)
        print(_remedy(url))
        return 1
    return 0


if __name__ == "__main__":
    # A call that hangs keeps nobody.
    code = main()
    sys.stdout.flush()
    os._exit(code)
