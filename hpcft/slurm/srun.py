"""The options srun was given, and whether a step started so survives the loss of a node.

Slurm tells a task nothing of ``--kill-on-bad-exit``, ``--no-kill`` and ``--wait``: the environment
variables of these names are read by srun and passed on only if the user had set them. What can be
had is srun's host and process number, from ``scontrol show step``; where that host is this one, as
it is for the first node of a batch job, the process itself tells. Elsewhere the answer is unknown.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcft.slurm.scontrol import ask, configuration
from hpcft.slurm.step import Step

# Options whose value is the next argument, so that it is not taken for srun's command.
_SHORT_WITH_VALUE = frozenset("AaBbCcDdEeFGgiJLMmNnoPpqRrSTtUWwx")
_LONG_WITHOUT_VALUE = re.compile(
    "--(contiguous|disable-status|exact|exclusive|external|get-user-env|help|immediate"
    "|interactive|kill-on-bad-exit|label|multi-prog|no-allocate|no-kill|no-shell|nvmps"
    "|overcommit|overlap|oversubscribe|preserve-env|propagate|pty|quiet|quit-on-interrupt|reboot"
    "|resv-ports|send-libs|spread-job|test-only|unbuffered|usage|use-min-nodes|verbose|version"
    "|whole)"
)


@dataclass(frozen=True)
class SrunOptions:
    """What srun does when a task or a node of its step ends early.

    kill_on_bad_exit: the first task with an exit code other than 0 ends all others.
    no_kill: the loss of a node leaves the other nodes' tasks alone.
    wait: seconds after the first task's end until the others are killed; 0 means never.
    """

    kill_on_bad_exit: bool
    no_kill: bool
    wait: int


def problems(options: SrunOptions) -> list[str]:
    """What would end the step where hpcft could go on, each with the option that prevents it."""
    found = []
    if options.kill_on_bad_exit:
        found.append("--kill-on-bad-exit=0 is missing: a lost rank would end all the others")
    if not options.no_kill:
        found.append("--no-kill is missing: a lost node would end all the others")
    if options.wait:
        found.append(
            f"--wait=0 is missing: {options.wait} s after the first task's end, be it a lost one, "
            "the others would be killed"
        )
    return found


def read_options(
    command: Sequence[str], environ: Mapping[str, str], config: Mapping[str, str]
) -> SrunOptions:
    """What srun makes of its command line, environment and the cluster's configuration.

    Parameters
    ----------
    command
        Its arguments, the program's name first.
    environ
        Its environment.
    config
        Names and values as ``scontrol show config`` prints them.
    """
    kill = environ.get("SLURM_KILL_BAD_EXIT", config.get("KillOnBadExit", "0"))
    no_kill = "SLURM_NO_KILL" in environ
    wait = environ.get("SLURM_WAIT", config.get("WaitTime", "0"))
    for name, value in _options(command):
        if name in ("-K", "--kill-on-bad-exit"):
            kill = value or "1"
        elif name in ("-k", "--no-kill"):
            no_kill = value != "off"
        elif name in ("-W", "--wait"):
            wait = value
    return SrunOptions(_number(kill) != 0, no_kill, _number(wait))


def options_of(step: Step) -> SrunOptions | None:
    """The options of the srun that started ``step``, or None where they cannot be told."""
    shown = ask("show", "step", f"{step.job}.{step.step}")
    found = re.search(r"SrunHost:Pid=([^\s:]+):(\d+)", shown)
    if not found or not _is_this_host(found[1]):
        return None
    try:
        process = Path("/proc") / found[2]
        command = process.joinpath("cmdline").read_text(errors="replace").split("\0")[:-1]
        entries = process.joinpath("environ").read_text(errors="replace").split("\0")
    except OSError:
        return None
    # The number may belong to another process by now, or to another machine of the same name.
    if not command or Path(command[0]).name != "srun":
        return None
    environ = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return read_options(command, environ, configuration())


def _options(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of srun's options, up to the program it is to run."""
    arguments = iter(command[1:])
    for argument in arguments:
        if argument == "--" or not argument.startswith("-"):
            return
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            if "=" not in argument and not _LONG_WITHOUT_VALUE.fullmatch(name):
                value = next(arguments, "")
            yield name, value
            continue
        letters = argument[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in _SHORT_WITH_VALUE:
                yield f"-{letter}", letters or next(arguments, "")
                break
            if letter in "kK":  # their value is optional, and then part of the same argument
                digits = re.match(r"=?(\d+|off)", letters)
                yield f"-{letter}", digits[1] if digits else ""
                letters = letters[digits.end() :] if digits else letters
            else:
                yield f"-{letter}", ""


def _number(text: str) -> int:
    found = re.match(r"\d+", text)  # as in "30 sec"
    return int(found[0]) if found else 0


def _is_this_host(name: str) -> bool:
    return name.split(".")[0] == socket.gethostname().split(".")[0]
