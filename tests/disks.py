"""Disks that fail."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

#: ioctls of linux/fs.h.
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


class Disk:
    """A file system of its own that can be frozen, or lost."""

    def __init__(self, path: Path, image: Path) -> None:
        self.path = path
        self._image = image
        self._fd = os.open(path, os.O_RDONLY)

    def freeze(self) -> None:
        fcntl.ioctl(self._fd, _FIFREEZE, 0)

    def thaw(self) -> None:
        fcntl.ioctl(self._fd, _FITHAW, 0)

    def fill(self) -> Path:
        """Have no room be left; there is some again when the file that is returned is removed."""
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
                        os.fsync(file.fileno())
        return filler

    def lose(self) -> None:
        """What is read from now on, and not cached, is an error (EIO)."""
        os.sync()
        os.truncate(self._image, 1 << 20)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was not frozen
            self.thaw()
        os.close(self._fd)


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Disk]:
    """A new one in ``folder``; where there can be none the test is skipped."""
    if os.geteuid() or not Path("/dev/loop-control").exists() or not shutil.which("mkfs.ext4"):
        pytest.skip("mounting a file system in a file needs root, loop devices and mkfs.ext4")
    image, place = folder / "image", folder / "disk"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    place.mkdir()
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    disk = Disk(place, image)
    yield disk
    disk.close()
    subprocess.run(["umount", "--lazy", place], check=True)
