"""What is said of the end of real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hpcft.launch.cause import Ending, ending, oom_kills


def status_of(script: str) -> int:
    """What ``waitpid`` says of a shell that runs ``script``."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("code", [0, 1, 3, 137, 255])
def test_an_exit_code_is_told_as_it_is(code: int) -> None:
    assert ending(status_of(f"exit {code}"), False) == Ending(code, f"exit code {code}")


def test_what_the_process_said_itself_is_added_to_its_exit_code() -> None:
    status = status_of("exit 1")
    assert ending(status, False, "ValueError: no").cause == "exit code 1: ValueError: no"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT])
def test_a_signal_is_told_by_name_with_the_shells_exit_code(number: signal.Signals) -> None:
    # Without a core dump, so that nothing is left behind.
    status = status_of(f"ulimit -c 0; kill -{number.value} $$")
    assert ending(status, False) == Ending(128 + number, f"killed by {number.name}")
    # Having said something before is no cause of a death by signal.
    assert ending(status, False, "ValueError: no").cause == f"killed by {number.name}"


def test_a_signal_without_a_name_is_told_by_number() -> None:
    assert ending(status_of("kill -40 $$"), False) == Ending(168, "killed by signal 40")


def test_a_kill_while_the_kernel_killed_for_memory_is_the_kernels() -> None:
    told = ending(status_of("kill -9 $$"), True)
    assert told == Ending(137, "out of memory: killed by the kernel (SIGKILL)")


@pytest.mark.parametrize("script", ["ulimit -c 0; kill -SEGV $$", "kill -TERM $$", "exit 137"])
def test_the_kernel_kills_for_memory_by_no_other_way(script: str) -> None:
    status = status_of(script)
    assert ending(status, True) == ending(status, False)


V1 = "12:cpu,cpuacct:/cpu\n7:memory:/job\n1:name=systemd:/sd\n0::/sd\n"
VMSTAT = "nr_free_pages 5\noom_kill 9\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"
EVENTS = "low 0\noom 5\noom_kill 3\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/memory.events": EVENTS}, 3),
        ({"/proc/self/cgroup": V1, "/sys/fs/cgroup/memory/job/memory.oom_control": CONTROL}, 4),
        ({"/proc/self/cgroup": "0::/\n", "/proc/vmstat": VMSTAT}, 9),
        ({"/proc/vmstat": VMSTAT}, 9),
        ({}, 0),
    ],
    ids=["v2", "v1", "cgroup without memory", "no cgroups", "nothing"],
)
def test_kills_for_memory_are_counted_where_the_kernel_says_them(
    files: dict[str, str], kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The own cgroup's count goes before the machine's.
    files = {"/proc/vmstat": VMSTAT, **files} if files else files

    def read(file: Path) -> str:
        if str(file) not in files:
            raise FileNotFoundError(file)
        return files[str(file)]

    monkeypatch.setattr(Path, "read_text", read)
    assert oom_kills() == kills


def test_kills_for_memory_can_be_counted_on_this_machine() -> None:
    assert oom_kills() >= 0
