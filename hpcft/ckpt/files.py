"""A checkpoint's file as the engine takes it: opened twice, through the page cache and past it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

#: What a file system answers that has no O_DIRECT.
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass
class OpenFile:
    """A file with its two descriptors; ``direct`` is -1 where the file system has no O_DIRECT."""

    path: Path
    buffered: int
    direct: int

    @classmethod
    def for_reading(cls, path: Path) -> OpenFile:
        """Open to read.

        Raises
        ------
        OSError: it cannot be opened.
        """
        file = cls._open(path, os.O_RDONLY)
        # Another node may have written over what this one has once cached of it, and network file
        # systems do not all tell.
        os.posix_fadvise(file.buffered, 0, 0, os.POSIX_FADV_DONTNEED)
        return file

    @classmethod
    def for_writing(cls, path: Path) -> OpenFile:
        """Open to write; made if it does not exist, left as it is if it does.

        Raises
        ------
        OSError: it cannot be opened.
        """
        return cls._open(path, os.O_RDWR | os.O_CREAT)

    @classmethod
    def _open(cls, path: Path, flags: int) -> OpenFile:
        buffered = os.open(path, flags | os.O_CLOEXEC, 0o644)
        try:
            direct = os.open(path, (flags & ~os.O_CREAT) | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            direct = -1
            if error.errno not in _NO_DIRECT:
                os.close(buffered)
                raise
        return cls(path, buffered, direct)

    @property
    def for_engine(self) -> tuple[str, int, int]:
        return str(self.path), self.buffered, self.direct

    @property
    def size(self) -> int:
        return os.fstat(self.buffered).st_size

    def read(self, offset: int, length: int) -> bytes:
        """Some bytes; fewer where the file ends before.

        Raises
        ------
        OSError: they cannot be read.
        """
        parts = []
        while length and (part := os.pread(self.buffered, length, offset)):
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def resize(self, size: int) -> None:
        """Make it exactly so long.

        Raises
        ------
        OSError: it cannot be.
        """
        if self.size != size:
            os.ftruncate(self.buffered, size)

    def close(self) -> None:
        for fd in (self.buffered, self.direct):
            if fd >= 0:
                os.close(fd)
        self.buffered = self.direct = -1

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def flush_directory(path: Path) -> None:
    """Have the names in a directory survive a power cut.

    Raises
    ------
    OSError: that cannot be had.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems have no fsync of directories; there the server sees to it.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(fd)
