"""What a shepherd can tell of its rank's process."""

from __future__ import annotations

import subprocess

from disks import Disk
from training import wait_for

from hpcft.launch.child import Child


def test_a_process_hangs_that_the_kernel_keeps_waiting_and_no_other(disk: Disk) -> None:
    disk.freeze()
    writer = subprocess.Popen(["touch", str(disk.path / "file")])
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        wait_for("the write to hang", Child(writer.pid).hangs)
        assert not Child(sleeper.pid).hangs()
    finally:
        disk.thaw()
        sleeper.kill()
        sleeper.wait()
        assert writer.wait() == 0
    assert not Child(writer.pid).hangs()
