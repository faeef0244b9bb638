"""On which file system checkpoints lie, and which layout of files suits it.

One file for all ranks is the simplest for everybody who reads it, and where many nodes may write to
one file at full speed it is as fast as any. Where they may not, each rank writes a file of its own.
"""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Layout = Literal["shared", "per-rank"]
Choice = Literal["auto", "shared", "per-rank"]

#: Seconds that ``lfs`` may take.
_LFS_TIME = 10.0
#: On these a file's data lies on one server, or one node's writes wait for another's.
_ONE_WRITER = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs")


@dataclass(frozen=True)
class FileSystem:
    """What a directory lies on.

    kind: as the kernel names it: ``ext4``, ``lustre``, ``fuse.glusterfs``...
    stripes: over how many servers the data of a new file is spread, 0 if that is not known.
    """

    kind: str
    stripes: int = 0

    def layout(self) -> tuple[Layout, str]:
        """The layout that suits it, and why, in words."""
        if self.kind in _ONE_WRITER:
            return (
                "per-rank",
                f"on {self.kind} nodes that write to one file get in each other's way",
            )
        if self.kind == "lustre" and self.stripes < 2:
            on = "one server" if self.stripes else "who knows how many servers"
            return "per-rank", f"on this directory of Lustre a file lies on {on} (lfs setstripe)"
        return "shared", f"on {self.kind} all ranks may write to one file"


def choose(choice: Choice, path: Path) -> tuple[Layout, str]:
    """The layout for checkpoints in ``path``, and why, in words.

    Raises
    ------
    OSError: the file system, by which it is to be chosen, cannot be told.
    """
    if choice == "auto":
        return at(path).layout()
    return choice, "as it was asked for"


def at(path: Path) -> FileSystem:
    """The file system that ``path``, which exists, lies on.

    Raises
    ------
    OSError: it cannot be told.
    """
    kind = _kind(path)
    return FileSystem(kind, _stripes(path) if kind == "lustre" else 0)


def _kind(path: Path) -> str:
    """The type of the mount at ``path``, from /proc/self/mountinfo (proc(5)).

    Not from statfs(2), which gives all of FUSE the same number.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    mount = about.partition("mnt_id:")[2].split()[0]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split(" ", 1)[0] == mount:
            return line.partition(" - ")[2].split(" ")[0]
    raise OSError(errno.ENOENT, "the kernel lists no mount for it", str(path))


def _stripes(directory: Path) -> int:
    """What ``lfs getstripe`` says of new files in a directory of Lustre; 0 if it does not.

    -1, all servers there are, counts as many.
    """
    command = ["lfs", "getstripe", "-d", "--stripe-count", str(directory)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_LFS_TIME).stdout
        count = int(said.split()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return 0
    return count if count >= 0 else 1 << 16
