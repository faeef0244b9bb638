"""Faults of file systems: full, slow, and a checkpoint with wrong bytes."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from hpcft.chaos import notes
from hpcft.chaos.faults import Fault, Refused, Task
from hpcft.chaos.processes import born, rank
from hpcft.ckpt import filesystem
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.reader import opened
from hpcft.ckpt.store import Checkpoint, Store
from hpcft.launch.cgroup import groups

#: Bytes that are left on a full disk.
_RESERVE = 1 << 20
#: Those of one host alone; any other may have users elsewhere.
_LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "zfs", "f2fs", "overlay"))
#: Of a control group of version 1: what limits its writing, and who is in it.
_THROTTLE, _PROCESSES = "blkio.throttle.write_bps_device", "cgroup.procs"
#: In place of a control group that there is none of: no such limit is in it.
_NONE = Path("/")
#: Bytes that are made wrong, in one place.
_WRONG = 64


def _checkpoints(task: Task) -> Path:
    if not task.checkpoints:
        raise Refused("it is not known where the run saves checkpoints", "give --ckpt-dir")
    path = Path(task.checkpoints)
    if not path.is_dir():
        raise Refused(f"there is no directory {path} on this host")
    return path


class Full(Fault):
    """A file that takes all room on the checkpoints' file system."""

    def prepare(self, task: Task) -> dict[str, Any]:
        path = _checkpoints(task)
        kind = filesystem.at(path).kind
        if not task.yes:
            raise Refused(f"all who use the file system of {path} would find it full", "say --yes")
        if kind not in _LOCAL and not task.shared:
            raise Refused(
                f"{path} is on {kind}, which other hosts may use as well",
                "say --shared-disk besides --yes, if nobody else is there",
            )
        return {"path": str(path / f".chaos-{secrets.token_hex(4)}")}

    def do(self, how: dict[str, Any]) -> None:
        path = Path(how["path"])
        with path.open("xb") as file:
            size, step = 0, shutil.disk_usage(path.parent).free
            # Not all that is free may be had at once, or by this user.
            while step >= _RESERVE:
                try:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step
                    step = shutil.disk_usage(path.parent).free
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    step //= 2
            # What is to say that it is undone needs room as well.
            os.ftruncate(file.fileno(), max(0, size - _RESERVE))

    def undo(self, how: dict[str, Any]) -> None:
        Path(how["path"]).unlink(missing_ok=True)


class SlowDisk(Fault):
    """A limit on what the rank writes to the disk; needs root.

    With version 2 of control groups that is a limit of the rank's own group, which has to have the
    io controller. With version 1 (blkio) the rank gets a group of its own below the one it is in.
    """

    def prepare(self, task: Task) -> dict[str, Any]:
        path = _checkpoints(task)
        how = rank(task)
        device = os.stat(path).st_dev
        if os.major(device) == 0:
            raise Refused(f"{path} is on no disk of this host")
        number = _disk(device)
        speed = int(task.amount * 1e6)
        # Of those in a line upwards the rank's own comes first.
        own: dict[bool, Path] = {}
        for group, second in groups("blkio", how["pid"]):
            own.setdefault(second, group)
        file, throttle = own.get(True, _NONE) / "io.max", own.get(False, _NONE) / _THROTTLE
        if os.access(file, os.W_OK):
            before = [line for line in file.read_text().splitlines() if line.split()[0] == number]
            return {
                "file": str(file),
                "limit": f"{number} wbps={speed}",
                "before": before[0] if before else f"{number} wbps=max",
            }
        if not os.access(throttle, os.W_OK):
            raise Refused(
                f"neither {file} can be written, by which a disk is made slow, nor {throttle}",
                "that takes root, and control groups with the io or the blkio controller",
            )
        made = throttle.parent / f"hpcft-chaos-{secrets.token_hex(4)}"
        return {**how, "own": str(made), "limit": f"{number} {speed}"}

    def do(self, how: dict[str, Any]) -> None:
        if "file" in how:
            Path(how["file"]).write_text(how["limit"])
            return
        own = Path(how["own"])
        own.mkdir()
        (own / _THROTTLE).write_text(how["limit"])
        if born(how["pid"]) == how["born"]:
            (own / _PROCESSES).write_text(str(how["pid"]))

    def undo(self, how: dict[str, Any]) -> None:
        if "file" in how:
            # With the group the limit has gone.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                Path(how["file"]).write_text(how["before"])
            return
        own = Path(how["own"])
        if not own.exists():
            return
        # The rank, and what it has started meanwhile.
        for pid in (own / _PROCESSES).read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (own.parent / _PROCESSES).write_text(pid)
        own.rmdir()


def _disk(device: int) -> str:
    """What the kernel calls the disk of a file system, of which it may be a part."""
    there = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if (there / "partition").exists():
        return (there.resolve().parent / "dev").read_text().strip()
    return there.name


class Corrupt(Fault):
    """Some bytes of a checkpoint become others; put back afterwards."""

    def prepare(self, task: Task) -> dict[str, Any]:
        path = _checkpoints(task)
        committed = Store(path).committed()
        if not committed:
            raise Refused(f"there is no checkpoint in {path} yet")
        if len(committed) < 2 and not task.newest:
            raise Refused(
                f"{committed[0].path} is the only checkpoint", "say newest, if that one is meant"
            )
        # The oldest may be given up for a new one at any moment.
        chosen = committed[-1] if task.newest else committed[-2]
        file, offset, length = _longest(chosen)
        with file.open("rb") as whole:
            whole.seek(offset)
            right = whole.read(min(length, _WRONG))
            inode = os.fstat(whole.fileno()).st_ino
        if any(note.how.get("path") == str(file) for _, note in notes.left(task.run_dir)):
            raise Refused(f"{file} has wrong bytes already")
        return {"path": str(file), "inode": inode, "offset": offset, "right": right.hex()}

    def do(self, how: dict[str, Any]) -> None:
        self._replace(how, bytes.fromhex(how["right"]), _flipped(how))

    def undo(self, how: dict[str, Any]) -> None:
        self._replace(how, _flipped(how), bytes.fromhex(how["right"]))

    def _replace(self, how: dict[str, Any], there: bytes, wanted: bytes) -> None:
        """Write bytes where certain others are; where they are not, it is another checkpoint."""
        with contextlib.suppress(FileNotFoundError), open(how["path"], "r+b") as file:
            file.seek(how["offset"])
            if os.fstat(file.fileno()).st_ino == how["inode"] and file.read(len(there)) == there:
                file.seek(how["offset"])
                file.write(wanted)
                file.flush()
                os.fsync(file.fileno())


def _longest(checkpoint: Checkpoint) -> tuple[Path, int, int]:
    """Where most of a checkpoint lies together: the file, the offset in it, how many bytes.

    Raises
    ------
    Refused: it cannot be read.
    """
    try:
        with opened(checkpoint.state) as found:
            rows = found.index.table
            if not len(rows):
                raise Refused(f"{checkpoint.path} has no tensors")
            _, _, length, number, offset = map(int, rows[rows[:, 2].argmax()])
            return checkpoint.path / found.index.files[number].name, offset, length
    except (Damaged, OSError) as error:
        raise Refused(f"{checkpoint.path} cannot be read: {error}") from error


def _flipped(how: dict[str, Any]) -> bytes:
    return bytes(byte ^ 0xFF for byte in bytes.fromhex(how["right"]))
