"""What a kill or a power cut leaves at any moment of a save is a store of whole checkpoints.

The system calls of real saves are recorded with strace and played back, every prefix of them: as a
kill leaves it, with all that was written, and as a power cut may, without what was not flushed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcft.ckpt._engine import Engine
from hpcft.ckpt.restore import load
from hpcft.ckpt.store import Store, files

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")

ENGINE = Engine(4 << 20, chunk=1 << 20)

# The second save leaves the first aside, the third writes over its file.
PROGRAM = """
import sys, torch
from pathlib import Path
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import Store, files
store = Store(Path(sys.argv[1])).create()
# Without io_uring, whose writes strace does not see.
saver = Saver(store, Alone(), Engine(4 << 20, chunk=65536, depth=0), layout=sys.argv[2])
for step in (1, 2, 3):
    save = saver.begin(step, {"w": torch.full((50_000,), float(step)), "step": step})
    save.wait_copied()
    while not save.advance():
        pass
    save.finish()
    for old in store.committed()[:-1]:
        # As ranks leave it that are no more.
        open(old.path / "shard-00007.h5", "w").close()
        store.discard(old)
"""


# The same by a spare, from what lies near the ranks; rank 0 commits.
DRAINS = """
import sys, torch
from pathlib import Path
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.drain import DrainShelf, drain, newest
from hpcft.ckpt.near import NearStore
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import METRICS, STATE, Store, shard
store, near = Store(Path(sys.argv[1])).create(), NearStore(Path(sys.argv[1] + "-near"))
gathered = near.gathering("0")
engine = Engine(4 << 20, chunk=65536, depth=0)
saver = Saver(near, Alone(), engine, layout="per-rank")
drainer = Saver(DrainShelf(store), Alone(), engine, layout="shared")
for step in (1, 2, 3):
    save = saver.begin(step, {"w": torch.full((50_000,), float(step)), "step": step})
    save.wait_copied()
    while not save.advance():
        pass
    save.finish()
    for name in (METRICS, shard(0), STATE):
        near.lend(save.folder.name, name, False, gathered)
    drained = drain(newest(gathered), drainer)
    store.take_in(drained.folder.name, drained.step)
    for old in store.committed()[:-1]:
        open(old.path / "shard-00007.h5", "w").close()
        store.discard(old)
"""


@dataclass(frozen=True)
class Call:
    """A system call that changes the store; ``path`` relative to it."""

    name: str
    path: str
    target: str = ""
    offset: int = 0
    data: bytes = b""


LAYOUTS = {
    "shared": ["state.h5"],
    "per-rank": ["shard-00000.h5", "state.h5"],
    "drained": ["state.h5"],
}


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory, layout: str) -> list[Call]:
    """What the program asks of the system."""
    path = tmp_path_factory.mktemp(layout)
    return record(path / "store", path / "traces", layout)


def record(store: Path, traces: Path, layout: str) -> list[Call]:
    """The calls of the program, in order."""
    traces.mkdir()
    program = DRAINS if layout == "drained" else PROGRAM
    calls = "pwrite64,ftruncate,fsync,rename,mkdir,openat,unlink,rmdir"
    command = ["strace", "-ff", "-o", str(traces / "t"), "-ttt", "-y", "-xx", "-s", "100000"]
    subprocess.run(
        [*command, "-e", f"trace={calls}", sys.executable, "-c", program, str(store), layout],
        check=True,
        timeout=120,
    )
    lines = sorted(
        line for file in traces.iterdir() for line in file.read_text().splitlines() if " = " in line
    )
    return list(understood(lines, store))


def plain(text: str) -> str:
    """Text that strace has written in hexadecimal."""
    return bytes.fromhex(text.replace("\\x", "")).decode()


def understood(lines: list[str], store: Path) -> Iterator[Call]:
    def inside(path: str) -> str | None:
        whole = Path(path)
        return str(whole.relative_to(store)) if whole.is_relative_to(store) else None

    for line in lines:
        found = re.match(r"[\d.]+ (\w+)\((.*)\)\s+= (\d+)", line)
        if not found:
            continue  # a call that failed
        name, arguments = found[1], found[2]
        texts = (
            [plain(t) for t in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)[:2]]
            if (name in ("rename", "mkdir", "openat", "unlink", "rmdir"))
            else []
        )
        if name == "rename":
            old, new = inside(texts[0]), inside(texts[1])
            if old is not None and new is not None:
                yield Call(name, old, new)
        elif name in ("mkdir", "unlink", "rmdir"):
            if (path := inside(texts[0])) is not None:
                yield Call(name, path)
        elif name == "openat":
            if "O_CREAT" in arguments and (path := inside(texts[0])) is not None:
                yield Call("create", path)
        else:
            of = re.match(r"\d+<((?:\\x[0-9a-f]{2})*|[^>]*)>", arguments)
            path_text = of[1] if of else ""
            path = inside(plain(path_text) if path_text.startswith("\\x") else path_text)
            if path is None:
                continue
            if name == "pwrite64":
                data, length, offset = re.findall(
                    r', "((?:\\x[0-9a-f]{2})*)", (\d+), (\d+)$', arguments
                )[0]
                content = bytes.fromhex(data.replace("\\x", ""))
                assert len(content) == int(length) == int(found[3])
                yield Call(name, path, offset=int(offset), data=content)
            elif name == "ftruncate":
                yield Call(name, path, offset=int(arguments.rpartition(", ")[2]))
            else:
                yield Call(name, path)


class Disk:
    """Files and names, as they are and as they certainly are after a power cut."""

    def __init__(self) -> None:
        #: Names: directories have None, files the number of their content.
        self.names: dict[str, int | None] = {}
        self.contents: list[bytearray] = []
        self.flushed: list[bytearray] = []

    def apply(self, call: Call) -> None:
        if call.name == "mkdir":
            self.names[call.path] = None
        elif call.name == "create":
            if call.path not in self.names:
                self.names[call.path] = len(self.contents)
                self.contents.append(bytearray())
                self.flushed.append(bytearray())
        elif call.name == "rename":
            for name in [n for n in self.names if n == call.path or n.startswith(call.path + "/")]:
                self.names[call.target + name[len(call.path) :]] = self.names.pop(name)
        elif call.name in ("unlink", "rmdir"):
            self.names.pop(call.path)
        else:
            self._change(call)

    def _change(self, call: Call) -> None:
        number = self.names.get(call.path)
        if number is None:  # a directory that is flushed
            return
        content = self.contents[number]
        if call.name == "fsync":
            self.flushed[number] = bytearray(content)
        elif call.name == "ftruncate":
            del content[call.offset :]
            content.extend(bytes(call.offset - len(content)))
        else:
            end = call.offset + len(call.data)
            content.extend(bytes(max(0, end - len(content))))
            content[call.offset : end] = call.data

    def write(self, folder: Path, flushed: bool) -> None:
        """Make the files under ``folder``."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, number in sorted(self.names.items()):
            if number is None:
                (folder / name).mkdir(exist_ok=True)
            else:
                contents = self.flushed if flushed else self.contents
                (folder / name).write_bytes(contents[number])


def whole_steps(folder: Path) -> list[int]:
    """The committed steps, each of which must be whole and hold what it says."""
    steps = []
    for checkpoint in Store(folder).committed():
        step, state = load(checkpoint.state, ENGINE)
        assert step == checkpoint.step == state["step"]
        assert set(state["w"].tolist()) == {float(step)}
        steps.append(step)
    return steps


def test_every_prefix_of_three_saves(tmp_path: Path, calls: list[Call], layout: str) -> None:
    names = [call.name for call in calls]
    # Three commits and two that were uncommitted; the third save found a directory aside.
    assert names.count("rename") == 6
    assert names.count("pwrite64") > 20
    disk = Disk()
    newest = 0
    for call in calls:
        disk.apply(call)
        disk.write(tmp_path / "killed", flushed=False)
        after_kill = whole_steps(tmp_path / "killed")
        # Names that are newer than the last flush of data: the worst a power cut can do.
        disk.write(tmp_path / "cut", flushed=True)
        assert whole_steps(tmp_path / "cut") == after_kill
        # Nothing that was committed is lost before something newer is there.
        assert max(after_kill, default=0) >= newest
        newest = max(after_kill, default=0)
    assert newest == 3
    disk.write(tmp_path / "end", flushed=True)
    assert whole_steps(tmp_path / "end") == [3]
    names = [file.name for file in files(tmp_path / "end" / "step-000000000003")]
    assert names == LAYOUTS[layout]
    Store(tmp_path / "end").sweep()
    assert [entry.name for entry in (tmp_path / "end").iterdir()] == ["step-000000000003"]


def test_the_commit_is_flushed_in_order(calls: list[Call], layout: str) -> None:
    """Files before directory before rename before parent."""
    commits = [i for i, c in enumerate(calls) if c.name == "rename" and c.target.startswith("step")]
    assert len(commits) == 3
    for number in commits:
        before, after = calls[:number], calls[number + 1 :]
        aside = calls[number].path
        flushes = [(i, c.path) for i, c in enumerate(before) if c.name == "fsync"]
        directory_flush = max(i for i, path in flushes if path == aside)
        for path in (f"{aside}/{name}" for name in LAYOUTS[layout]):
            writes = [i for i, c in enumerate(before) if (c.name, c.path) == ("pwrite64", path)]
            file_flush = max(i for i, flushed in flushes if flushed == path)
            assert writes[-1] < file_flush < directory_flush
        # Names are made, and removed, before as well.
        named = [i for i, c in enumerate(before) if c.name in ("create", "unlink")]
        assert named[-1] < directory_flush
        # Before the next commit, or anything else is renamed.
        following = next(c for c in after if c.name in ("fsync", "rename"))
        assert (following.name, following.path) == ("fsync", ".")
