"""Checkpoints in pieces on several nodes: every good copy is found, and no bad one is believed."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import pytest
import torch
from disks import Disk
from hypothesis import given
from hypothesis import strategies as st
from players import Player, together
from shardings import blank, state
from torch.distributed.tensor import DTensor, Placement, Shard

from hpcft.ckpt import parity, rebuild, scattered
from hpcft.ckpt._engine import Engine, exclusive_or
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.near import NearStore, Tier, claimed, place
from hpcft.ckpt.parity import CHUNK
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.save import Saver
from hpcft.ckpt.store import STATE, shard
from hpcft.launch.courier import Address, Courier

ENGINE = Engine(8 << 20, chunk=1 << 20, depth=0)
RANKS = 4
Cut = tuple[tuple[int, ...], list[Placement] | None]
SHARDED: Cut = ((RANKS,), [Shard(0)])
REPLICATED: Cut = ((RANKS,), None)


def stores(base: Path) -> list[NearStore]:
    """Those of nodes with a rank each."""
    return [NearStore(base / f"n{rank}") for rank in range(RANKS)]


def save(nodes: list[NearStore], step: int, cut: Cut, copies: bool = True) -> str:
    """Save near ranks; every node then has what the one before has written, too."""

    def one(ranks: Player) -> str:
        store = nodes[ranks.rank]
        saving = Saver(store, ranks, ENGINE, layout="per-rank").begin(
            step, state(*cut, ranks.rank) | {"step": step}
        )
        saving.wait_copied()
        while not saving.advance():
            pass
        saving.finish()
        store.clear(saving.folder)
        return saving.folder.name

    [name] = set(together(RANKS, one))
    for rank, store in enumerate(nodes if copies else []):
        partner = nodes[(rank + 1) % RANKS]
        for file in (store.path / name).glob("*.h5"):
            shutil.copy(file, partner.room(name, file.name))
    return str(name)


def restore(
    nodes: list[NearStore],
    cut: Cut,
    told: list[str] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> list[Any]:
    """What each rank gets of the newest: its state, or the error.

    Parameters
    ----------
    meanwhile: happens after it has been found.
    """

    def one(ranks: Player) -> Any:
        live = state(*cut, ranks.rank)
        store = nodes[ranks.rank]
        found = scattered.find(ranks, store)
        if ranks.rank == 0:
            meanwhile()
        ranks.least(0)

        def report(why: str) -> None:
            if told is not None and ranks.rank == 0:
                told.append(why)

        wanted = cut[1] is not None or ranks.rank == 0
        return scattered.load(found[-1], store, ENGINE, ranks, blank(live), wanted, report)

    return together(len(nodes), one)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, DTensor):
        return torch.equal(a.to_local(), b.to_local())
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return bool(a.keys() == b.keys() and all(same(a[key], b[key]) for key in a))
    return bool(a == b)


def right(found: list[Any], step: int, cut: Cut) -> bool:
    """Whether all that wanted the state have it."""
    return all(
        got[0] == step and same(got[1], state(*cut, rank) | {"step": step})
        for rank, got in enumerate(found)
        if cut[1] is not None or rank == 0
    )


@pytest.mark.parametrize("cut", [SHARDED, REPLICATED])
def test_every_rank_reads_its_own(tmp_path: Path, cut: Cut) -> None:
    nodes = stores(tmp_path)
    save(nodes, 5, cut, copies=False)
    assert right(restore(nodes, cut), 5, cut)


@pytest.mark.parametrize("cut", [SHARDED, REPLICATED])
@pytest.mark.parametrize("lost", range(RANKS))
def test_what_a_lost_node_had_is_elsewhere(tmp_path: Path, cut: Cut, lost: int) -> None:
    nodes = stores(tmp_path)
    save(nodes, 5, cut)
    shutil.rmtree(nodes[lost].path)
    # By as many ranks, one of them on a node that has nothing, and by one less.
    assert right(restore(nodes, cut), 5, cut)
    fewer: Cut = ((RANKS - 1,), cut[1])
    assert right(restore(nodes[:lost] + nodes[lost + 1 :], fewer), 5, fewer)


def test_without_copies_a_lost_node_is_told(tmp_path: Path) -> None:
    nodes = stores(tmp_path)
    save(nodes, 5, SHARDED, copies=False)
    shutil.rmtree(nodes[2].path)
    for error in restore(nodes, SHARDED):
        assert isinstance(error, Damaged)
        assert f"no node has a good {shard(2)}" in str(error)


def spoil(file: Path) -> None:
    places: list[int] = []
    with h5py.File(file) as content:
        content.visititems(
            lambda _, found: (
                places.append(found.id.get_offset()) if isinstance(found, h5py.Dataset) else None
            )
        )
    at = places[0]
    with file.open("r+b") as raw:
        raw.seek(at)
        raw.write(bytes(byte ^ 255 for byte in os.pread(raw.fileno(), 100, at)))


@pytest.mark.parametrize("cut", [SHARDED, REPLICATED])
def test_a_corrupt_copy_is_told_and_the_other_read(tmp_path: Path, cut: Cut) -> None:
    nodes = stores(tmp_path)
    name = save(nodes, 5, cut)
    spoil(nodes[1].path / name / shard(1))
    told: list[str] = []
    assert right(restore(nodes, cut, told), 5, cut)
    assert len(told) == 1
    assert shard(1) in told[0]
    spoil(nodes[2].path / name / "copies" / shard(1))
    assert all(isinstance(error, Damaged) for error in restore(nodes, cut))


def to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


@pytest.mark.parametrize("cut", [SHARDED, REPLICATED])
@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (Path.unlink, "is missing"),
        (to_itself, "cannot be read: Too many levels"),
        (lambda file: os.truncate(file, 1000), "has 1000 bytes"),
    ],
)
def test_a_copy_that_is_gone_when_it_is_read_is_told_and_the_other_read(
    tmp_path: Path, cut: Cut, harm: Callable[[Path], object], why: str
) -> None:
    nodes = stores(tmp_path)
    name = save(nodes, 5, cut)
    told: list[str] = []

    def twice() -> None:
        # Of two ranks, which each know only of their own.
        harm(nodes[1].path / name / shard(1))
        harm(nodes[2].path / name / shard(2))

    assert right(restore(nodes, cut, told, twice), 5, cut)
    assert len(told) == 1
    assert all(part in told[0] for part in (shard(1), shard(2), why))
    harm(nodes[2].path / name / "copies" / shard(1))
    assert all(isinstance(error, Damaged) for error in restore(nodes, cut))


def test_a_disk_that_fails_is_told_and_the_other_nodes_copies_read(
    tmp_path: Path, disk: Disk
) -> None:
    nodes = [NearStore(disk.path / "n0"), *stores(tmp_path)[1:]]
    save(nodes, 5, SHARDED)
    told: list[str] = []
    assert right(restore(nodes, SHARDED, told, disk.lose), 5, SHARDED)
    assert len(told) == 1
    assert f"{shard(0)} cannot be read: read failed: Input/output error" in told[0]


def test_a_file_of_another_size_is_no_copy(tmp_path: Path) -> None:
    nodes = stores(tmp_path)
    name = save(nodes, 5, SHARDED)
    os.truncate(nodes[3].path / name / shard(3), 1000)
    assert right(restore(nodes, SHARDED), 5, SHARDED)


def test_the_state_file_comes_from_whoever_has_a_good_one(tmp_path: Path) -> None:
    nodes = stores(tmp_path)
    name = save(nodes, 5, SHARDED)
    with (nodes[0].path / name / STATE).open("r+b") as raw:
        raw.seek(100)
        raw.write(b"\xff" * 8)
    assert right(restore(nodes, SHARDED), 5, SHARDED)
    (nodes[1].path / name / "copies" / STATE).unlink()
    assert all(isinstance(error, Damaged) for error in restore(nodes, SHARDED))


def test_one_that_is_being_written_is_not_found(tmp_path: Path) -> None:
    nodes = stores(tmp_path)
    older = save(nodes, 5, SHARDED)
    for store in nodes:
        store.kept = frozenset([older])
    newer = save(nodes, 6, SHARDED, copies=False)
    with (nodes[0].path / newer / STATE).open("r+b") as raw:
        raw.write(bytes(4096))
    assert right(restore(nodes, SHARDED), 5, SHARDED)


def test_what_is_to_be_kept_is(tmp_path: Path) -> None:
    nodes = stores(tmp_path)
    first = save(nodes, 1, SHARDED)
    for store in nodes:
        store.kept = frozenset([first, ""])
    second, third = save(nodes, 2, SHARDED, copies=False), save(nodes, 3, SHARDED)
    assert [sorted(store.files()) for store in nodes] == [[first, third]] * RANKS
    for store in nodes:
        store.kept = frozenset([second, third])
    fourth = save(nodes, 4, SHARDED)
    assert [sorted(store.files()) for store in nodes] == [[third, fourth]] * RANKS
    assert right(restore(nodes, SHARDED), 4, SHARDED)


def test_what_is_not_kept_is_written_over(tmp_path: Path) -> None:
    nodes = stores(tmp_path)

    def inodes(name: str) -> list[int]:
        return [(store.path / name / shard(rank)).stat().st_ino for rank, store in enumerate(nodes)]

    first = inodes(save(nodes, 1, SHARDED))
    second = save(nodes, 2, SHARDED)
    assert inodes(second) == first
    for store in nodes:
        store.kept = frozenset([second])
    assert inodes(save(nodes, 3, SHARDED)) != first
    assert right(restore(nodes, SHARDED), 3, SHARDED)


def test_a_node_of_spares_does_not_fill_up(tmp_path: Path) -> None:
    store = NearStore(tmp_path)
    for step in range(10):
        name = f"{step:012d}-00000000"
        store.room(name, STATE).touch()
        store.clear_copies(name)
    assert len(store.files()) <= 4


def test_what_is_newer_than_where_training_begins_again_is_forgotten(tmp_path: Path) -> None:
    nodes = stores(tmp_path)
    older = save(nodes, 3, SHARDED)
    nodes[0].kept = frozenset([older])
    save(nodes, 5, SHARDED)
    nodes[0].forget(4)
    assert list(nodes[0].files()) == [older]


# -- on a node -----------------------------------------------------------------------------------


def tier(base: Path, job: str, directory: str = "/ckpt") -> Tier:
    return Tier(1, False, place(str(base), directory, {"SLURM_JOB_ID": job} if job else {}))


def test_what_ended_jobs_have_left_is_removed(tmp_path: Path) -> None:
    old, running, own, local = (tier(tmp_path, job) for job in ("1", "2", "3", ""))
    with claimed((running,), 0.0):
        for left in (old, own, local):
            Path(left.path).mkdir()
            for name in ("lock", "left"):
                (Path(left.path) / name).touch()
        with claimed((own,), Path(local.path).stat().st_mtime):
            assert not Path(old.path).exists()
            assert not Path(local.path).exists()
            assert (Path(own.path) / "left").exists()
            assert Path(running.path).exists()


def test_a_local_run_leaves_what_another_may_want(tmp_path: Path) -> None:
    first, second = (tier(tmp_path, "", folder) for folder in ("/a", "/b"))
    with claimed((first,), 0.0):
        pass
    now = Path(first.path).stat().st_mtime
    with claimed((second,), now + 60):
        assert Path(first.path).exists()
    with claimed((second,), now + 100_000):
        assert not Path(first.path).exists()


# -- from node to node ---------------------------------------------------------------------------


def spread(base: Path, cut: Cut) -> list[NearStore]:
    """Save, with parity over all nodes by real couriers, and the state file everywhere."""
    nodes = stores(base)
    folder = save(nodes, 5, cut, copies=False)

    async def run() -> None:
        couriers = [Courier(rank, [store]) for rank, store in enumerate(nodes)]
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in nodes]
        members = [Address(rank, *sock.getsockname()) for rank, sock in enumerate(sockets)]
        for courier, sock in zip(couriers, sockets, strict=True):
            await courier.listen(sock, b"secret")
        sends = []
        for rank, courier in enumerate(couriers):
            own = shard(rank) if (nodes[rank].path / folder / shard(rank)).exists() else ""
            sends.append(courier.send_parity(members, 0, folder, own))
        await asyncio.gather(*sends)
        for to in members[1:]:
            await couriers[0].send(to, 0, folder, [STATE])

    asyncio.run(run())
    return nodes


@pytest.mark.parametrize("cut", [SHARDED, REPLICATED])
@pytest.mark.parametrize("lost", range(RANKS))
def test_what_a_lost_node_had_is_made_from_parity(tmp_path: Path, cut: Cut, lost: int) -> None:
    nodes = spread(tmp_path, cut)
    shutil.rmtree(nodes[lost].path)
    assert right(restore(nodes, cut), 5, cut)


def test_a_corrupt_file_is_made_from_parity(tmp_path: Path) -> None:
    nodes = spread(tmp_path, SHARDED)
    [name] = nodes[1].files()
    spoil(nodes[1].path / name / shard(1))
    told: list[str] = []
    assert right(restore(nodes, SHARDED, told), 5, SHARDED)
    assert len(told) == 1
    assert shard(1) in told[0]


@given(
    sizes=st.lists(st.integers(0, 2000), min_size=2, max_size=5),
    lost=st.integers(0, 4),
    chunk=st.integers(1, 40),
)
def test_parity_is_enough_for_any_one(sizes: list[int], lost: int, chunk: int) -> None:
    members = tuple(range(10, 10 + len(sizes)))
    lost %= len(sizes)
    contents = [os.urandom(size) for size in sizes]
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(parity, "CHUNK", chunk),
        mock.patch.object(rebuild, "CHUNK", chunk),
    ):
        files, parities = [], []
        for place, keeper in enumerate(members):
            kept = bytearray(parity.stripes(max(sizes), len(members)) * chunk)
            for member, content in zip(members, contents, strict=True):
                if member != keeper:
                    stretches = parity.chunks(len(content), members, member, keeper)
                    for stripe, stretch in enumerate(stretches):
                        with memoryview(kept) as whole, whole[stripe * chunk :] as rest:
                            exclusive_or(rest, content[stretch.start : stretch.stop])
            if place != lost:
                path = Path(folder) / f"{keeper}"
                path.write_bytes(contents[place])
                files.append(rebuild.Source(0, keeper, sizes[place], path))
                path = Path(folder) / f"parity-{keeper}"
                path.write_bytes(kept)
                parities.append(rebuild.Source(0, keeper, len(kept), path))
        recipe = rebuild.Recipe(members[lost], sizes[lost], members, tuple(files), tuple(parities))
        made = Path(folder) / "made"
        made.touch()
        rebuild.rebuild(Alone(), recipe, 0, made)
        assert made.read_bytes() == contents[lost]


def test_parity_does_not_make_up_for_two(tmp_path: Path) -> None:
    nodes = spread(tmp_path, SHARDED)
    for lost in (1, 2):
        shutil.rmtree(nodes[lost].path)
    assert all(isinstance(error, Damaged) for error in restore(nodes, SHARDED))


def test_parity_takes_its_part_of_the_memory(tmp_path: Path) -> None:
    for node in spread(tmp_path, SHARDED):
        [name] = node.files()
        own = sum(f.size for f in node.files()[name] if f.name.startswith("shard"))
        [kept] = node.parities()[name]
        assert kept.size <= own / (RANKS - 1) + CHUNK


def carry(
    base: Path, send: Callable[[Courier, Address], Any], secrets: tuple[bytes, bytes] = (b"s", b"s")
) -> Path:
    """Send from one node to another; the path of the other."""
    ours, theirs = NearStore(base / "ours"), NearStore(base / "theirs")

    async def run() -> None:
        sender, receiver = Courier(0, [ours]), Courier(1, [theirs])
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        for courier, sock, secret in zip((sender, receiver), sockets, secrets, strict=True):
            await courier.listen(sock, secret)
        await send(sender, Address(1, *sockets[1].getsockname()))

    asyncio.run(run())
    return theirs.path


@pytest.mark.parametrize("sizes", [(0,), (1, 70_000), (5_000_000, 0, 3)])
def test_files_arrive_as_they_are(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    folder = tmp_path / "ours" / "000000000001-00000000"
    folder.mkdir(parents=True)
    contents = {shard(number): os.urandom(size) for number, size in enumerate(sizes)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    path = carry(tmp_path, lambda courier, to: courier.send(to, 0, folder.name, list(contents)))
    arrived = path / folder.name / "copies"
    assert {file.name: file.read_bytes() for file in arrived.iterdir()} == contents


@pytest.mark.parametrize(
    ("checkpoint", "file"),
    [("..", "state.h5"), ("000000000001-00000000", "../x"), ("x/y", "state.h5")],
)
def test_nothing_is_written_elsewhere(tmp_path: Path, checkpoint: str, file: str) -> None:
    source = tmp_path / "ours" / checkpoint / file
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_bytes(b"x")
    with pytest.raises(OSError, match="no file of a checkpoint"):
        carry(tmp_path, lambda courier, to: courier.send(to, 0, checkpoint, [file]))


def test_a_stranger_sends_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "ours" / "000000000001-00000000"
    folder.mkdir(parents=True)
    (folder / STATE).write_bytes(b"x")
    with pytest.raises(ConnectionError):
        carry(
            tmp_path,
            lambda courier, to: courier.send(to, 0, folder.name, [STATE]),
            (b"one", b"another"),
        )
    assert not (tmp_path / "theirs").exists()


def test_what_a_node_has_of_others_can_be_given_up(tmp_path: Path) -> None:
    store = NearStore(tmp_path)
    folder = store.begin(3)
    (folder / STATE).write_bytes(b"own state")
    store.room(folder.name, shard(1)).touch()
    assert store.clear_others()
    assert not store.clear_others()
    assert [(file.name, file.copy) for file in store.files()[folder.name]] == [(STATE, False)]
    # And comes again with the next.
    store.room(folder.name, shard(1)).touch()
    assert {file.name for file in store.files()[folder.name]} == {STATE, shard(1)}
