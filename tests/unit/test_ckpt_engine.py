"""The engine that moves memory to files, from Python.

``make -C c_ext check`` runs it under the sanitizers.
"""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.ckpt._engine import Engine, Transfer, crc32c, crc32c_combine
from hpcft.ckpt.files import OpenFile

MIB = 1 << 20


@pytest.fixture(params=[0, 4], ids=["threads", "io_uring"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(4 * MIB, chunk=MIB, depth=request.param)


def write(engine: Engine, path: Path, *extents: tuple[object, int]) -> Transfer:
    listed = [(data, 0, offset, len(data)) for data, offset in extents]  # type: ignore[arg-type]
    with OpenFile.for_writing(path) as file:
        return engine.write([file.for_engine], listed)  # type: ignore[arg-type]


def test_known_checksums() -> None:
    # RFC 3720, B.4, and the usual check value.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=70000), st.integers(0, 70000))
def test_checksums_of_parts_combine(data: bytes, cut: int) -> None:
    first, second = data[:cut], data[cut:]
    whole = crc32c(data)
    assert crc32c(second, crc32c(first)) == whole
    assert crc32c_combine(crc32c(first), crc32c(second), len(second)) == whole


def test_what_is_written_is_there_and_summed(engine: Engine, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts = [rng.bytes(n) for n in (1, 4095, 4096, 100_000, 3 * MIB + 5)]
    offsets = [7, 4096, 10_000, 3 * MIB - 1, 10 * MIB]
    transfer = write(engine, tmp_path / "f", *zip(parts, offsets, strict=True))
    assert transfer.wait_copied(60)
    assert transfer.wait(60)
    total = sum(map(len, parts))
    assert transfer.progress() == (total, total, total, True)
    content = (tmp_path / "f").read_bytes()
    assert [content[o : o + len(p)] for p, o in zip(parts, offsets, strict=True)] == parts
    assert transfer.checksums() == [crc32c(part) for part in parts]

    back = [bytearray(len(part)) for part in parts]
    with OpenFile.for_reading(tmp_path / "f") as file:
        extents = [(b, 0, o, len(b)) for b, o in zip(back, offsets, strict=True)]
        reading = engine.read([file.for_engine], extents)
    assert reading.wait(60)
    assert back == parts
    assert reading.checksums() == transfer.checksums()


def test_the_source_may_change_once_it_is_copied(tmp_path: Path) -> None:
    # Slow enough that nothing is written when the copy is done.
    engine = Engine(8 * MIB, chunk=MIB, bandwidth=20 * MIB)
    source = np.full(4 * MIB, 1, np.uint8)
    transfer = write(engine, tmp_path / "f", (source, 0))
    assert transfer.wait_copied(60)
    source[:] = 2
    assert not transfer.wait(0)
    assert transfer.wait(60)
    assert set((tmp_path / "f").read_bytes()) == {1}


def test_never_more_memory_than_the_pool(tmp_path: Path) -> None:
    engine = Engine(2 * MIB, chunk=MIB)
    transfer = write(engine, tmp_path / "f", (bytes(20 * MIB), 0))
    assert transfer.wait(60)
    assert engine.peak <= 2 * MIB


def test_bandwidth_is_kept(tmp_path: Path) -> None:
    engine = Engine(16 * MIB, chunk=MIB, bandwidth=1000)
    transfer = write(engine, tmp_path / "f", (bytes(8 * MIB), 0))
    assert transfer.wait_copied(60)
    # The first chunk goes at once, the second a quarter of an hour later.
    assert transfer.progress()[2] <= MIB


def test_a_full_device_is_said_with_its_name(engine: Engine) -> None:
    transfer = write(engine, Path("/dev/full"), (bytes(100_000), 0))
    with pytest.raises(OSError, match="write failed: No space left") as caught:
        transfer.wait(60)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == "/dev/full"
    with pytest.raises(OSError, match="write failed"):
        transfer.checksums()


def test_a_file_that_is_too_short_is_said(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(5000))
    with OpenFile.for_reading(tmp_path / "f") as file:
        transfer = engine.read([file.for_engine], [(bytearray(2000), 0, 4000, 2000)])
    with pytest.raises(EOFError, match="f ends too early"):
        transfer.wait(60)


def test_wrong_arguments_are_refused(engine: Engine, tmp_path: Path) -> None:
    with OpenFile.for_writing(tmp_path / "f") as file:
        files = [file.for_engine]
        with pytest.raises(ValueError, match="before the end of the one before"):
            engine.write(files, [(b"abc", 0, 0, 3), (b"abc", 0, 2, 3)])
        with pytest.raises(ValueError, match="there is no file 1"):
            engine.write(files, [(b"abc", 1, 0, 3)])
        with pytest.raises(ValueError, match="4 bytes of a buffer of 3"):
            engine.write(files, [(b"abc", 0, 0, 4)])
        with pytest.raises(ValueError, match="no file is as large"):
            engine.write(files, [(None, 0, 2**63 - 1, 2)])
        with pytest.raises(TypeError):
            engine.write(files, [b"abc"])  # type: ignore[list-item]
        with pytest.raises(BufferError):
            engine.read(files, [(b"abc", 0, 0, 3)])
    with pytest.raises(OSError, match="Bad file descriptor"):
        engine.write([("gone", 9999, -1)], [(b"abc", 0, 0, 3)])
    assert (tmp_path / "f").stat().st_size == 0
    for wrong in ({"chunk": 1000}, {"movers": 0}, {"depth": -1}, {"cpus": [-1]}):
        with pytest.raises(ValueError, match=r"chunk|threads|processor"):
            Engine(MIB, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one chunk"):
        Engine(1)


def test_a_transfer_can_be_cancelled(tmp_path: Path) -> None:
    engine = Engine(2 * MIB, chunk=MIB, bandwidth=MIB)
    transfer = write(engine, tmp_path / "f", (bytes(50 * MIB), 0))
    transfer.cancel()
    with pytest.raises(InterruptedError):
        transfer.wait(60)
    # The engine goes on with others.
    assert write(engine, tmp_path / "g", (b"abc", 0)).wait(60)


def test_sources_are_let_go_with_the_transfer(tmp_path: Path) -> None:
    engine = Engine(2 * MIB, chunk=MIB, bandwidth=MIB)
    source = np.zeros(20 * MIB, np.uint8)
    alive = weakref.ref(source)
    transfer = write(engine, tmp_path / "f", (source, 0))
    del source
    gc.collect()
    assert alive() is not None
    del transfer
    gc.collect()
    assert alive() is None


def test_after_closing_nothing_new_begins(engine: Engine, tmp_path: Path) -> None:
    transfer = write(engine, tmp_path / "f", (bytes(MIB), 0))
    assert transfer.wait_copied(60)
    engine.close()
    engine.close()
    assert transfer.wait(60)
    with pytest.raises(ValueError, match="closed"):
        write(engine, tmp_path / "g", (b"abc", 0))


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, str(folder / "f")],
        capture_output=True,
        text=True,
        timeout=60,
    )


BEGIN = """
import os, sys, signal, threading, time
from hpcft.ckpt._engine import Engine
path = sys.argv[1]
fd = os.open(path, os.O_RDWR | os.O_CREAT)
engine = Engine(4 << 20, chunk=1 << 20, bandwidth=1 << 20)
transfer = engine.write([(path, fd, -1)], [(bytes(64 << 20), 0, 0, 64 << 20)])
"""


def test_the_interpreters_end_is_not_held_up(tmp_path: Path) -> None:
    done = run(BEGIN + "print('leaving')", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_a_forked_child_is_told_and_comes_to_its_end(tmp_path: Path) -> None:
    program = (
        BEGIN
        + """
pid = os.fork()
if pid == 0:
    try:
        transfer.wait()
    except RuntimeError as error:
        assert "fork" in str(error)
    try:
        engine.write([(path, fd, -1)], [])
    except RuntimeError as error:
        del transfer, engine
        engine = Engine(1 << 20, chunk=1 << 20)
        assert engine.write([(path + "2", fd, -1)], [(b"abc", 0, 0, 3)]).wait(30)
        sys.exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    done = run(program, tmp_path)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_wait_can_be_interrupted(tmp_path: Path) -> None:
    program = (
        BEGIN
        + """
# Who starts the tests may have it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    transfer.wait()
except KeyboardInterrupt:
    print("interrupted")
"""
    )
    assert run(program, tmp_path).stdout == "interrupted\n"


def test_threads_stay_where_they_are_told(tmp_path: Path) -> None:
    where = min(os.sched_getaffinity(0))
    engine = Engine(2 * MIB, chunk=MIB, cpus=[where], niceness=5, copiers=1, movers=1)
    assert write(engine, tmp_path / "f", (b"abc", 0)).wait(60)
    others = {int(t) for t in os.listdir("/proc/self/task")} - {os.getpid()}
    pinned = [t for t in others if os.sched_getaffinity(t) == {where}]
    assert len(pinned) >= 2
    assert any(os.getpriority(os.PRIO_PROCESS, t) == os.nice(0) + 5 for t in pinned)
