"""Asking Slurm's controller, and telling it, by ``scontrol``."""

from __future__ import annotations

import re
import subprocess
import time

#: Slurm signals all processes of a job that it ends, and what tells it something may be one.
_UNSIGNALLED = ("sh", "-c", "trap '' TERM; exec \"$@\"", "sh")
_SECONDS = 10.0  # a busy controller answers late; nobody is to wait for it for long
#: Seconds in which it is asked again, if that is what it wants, and between two times.
_PATIENCE, _PAUSE = 3.0, 0.5


class Refused(Exception):
    """The controller did not do what it was asked to; says why."""


def ask(*arguments: str) -> str:
    """What ``scontrol`` prints; empty if it cannot be had."""
    try:
        return tell(*arguments)
    except Refused:
        return ""


def tell(*arguments: str, seconds: float = _SECONDS) -> str:
    """Have ``scontrol`` do something, and return what it prints.

    Parameters
    ----------
    seconds: it may take. It is asked again for some of them if the controller wants that, as it
        does of a job that it has not told its accounting of.

    Raises
    ------
    Refused: it cannot be done.
    """
    patience = time.monotonic() + min(seconds, _PATIENCE)
    while True:
        try:
            done = subprocess.run(
                [*_UNSIGNALLED, "scontrol", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Refused(f"the controller does not answer within {seconds:g} s") from error
        if not done.returncode:
            return done.stdout
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        if "try again" not in done.stderr or time.monotonic() > patience:
            raise Refused(said[-1] if said else f"scontrol ends with {done.returncode}")
        time.sleep(_PAUSE)


def configuration() -> dict[str, str]:
    """The cluster's configuration, empty if it cannot be had."""
    lines = ask("show", "config").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def fields(record: str) -> dict[str, str]:
    """The fields of one record as ``scontrol --oneliner show`` prints it.

    >>> fields("JobId=7 JobName=my job Requeue=1")["JobName"]
    'my job'
    """
    # A value goes on until the next word that is a name.
    found = re.findall(r"(?:^|\s)([A-Za-z][\w:/.-]*)=(.*?)(?=\s[A-Za-z][\w:/.-]*=|$)", record)
    return {name: value.strip() for name, value in found}


def seconds(text: str) -> float | None:
    """Slurm's times, such as ``30``, ``30 sec``, ``01:30:00`` and ``2-00:00:00``, in seconds.

    Returns
    -------
    None if there is no limit, or it is no time.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found:
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    found = re.fullmatch(r"(\d+)(?: sec(?:onds)?)?", text)
    return float(found[1]) if found else None
