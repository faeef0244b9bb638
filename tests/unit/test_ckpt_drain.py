"""What a spare makes of a checkpoint near the ranks is what they would have saved, or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from players import Player, together
from shardings import state as state_of
from test_copies import fleets
from torch.distributed.tensor import Placement, Shard

import hpcft
from hpcft.ckpt._engine import Engine
from hpcft.ckpt.drain import DrainShelf, drain, newest
from hpcft.ckpt.index import Damaged
from hpcft.ckpt.near import NearStore, Tier
from hpcft.ckpt.ranks import Alone
from hpcft.ckpt.reader import opened
from hpcft.ckpt.restore import load
from hpcft.ckpt.save import Save, SaveFailed, Saver, Shelf
from hpcft.ckpt.store import METRICS, STATE, Checkpoint, Store, shard
from hpcft.launch.channel import Message
from hpcft.launch.copies import Copies
from hpcft.launch.courier import Courier
from hpcft.launch.crew import Crew
from hpcft.launch.fleet import Fleet, Listener
from hpcft.launch.place import Place
from hpcft.train.series import Hooks, Series

ENGINE = Engine(8 << 20, chunk=1 << 20, depth=0)
RANKS = 3
REPLICATED: list[Placement] | None = None
STEP = 120


def save(shelf: Shelf, cut: list[Placement] | None, layout: str, step: int = STEP) -> str:
    """What the ranks' checkpoint is called."""

    def one(ranks: Player) -> str:
        tree = state_of((RANKS,), cut, ranks.rank)
        saving = Saver(shelf, ranks, ENGINE, layout=layout).begin(step, tree, {"loss": 0.5})
        while not saving.advance():
            pass
        saving.finish()
        return saving.folder.name

    [name] = set(together(RANKS, one))
    return str(name)


def gather(near: NearStore, name: str, files: list[str] | None = None) -> NearStore:
    """Where a spare finds it."""
    there = near.gathering("0")
    for file in files or [METRICS, *(shard(rank) for rank in range(RANKS)), STATE]:
        near.lend(name, file, False, there)
    return there


def drainer(store: Store, layout: str = "shared") -> Saver:
    return Saver(DrainShelf(store), Alone(), ENGINE, layout=layout)


@pytest.fixture
def near(tmp_path: Path) -> NearStore:
    return NearStore(tmp_path / "near")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "far").create()


@pytest.fixture
def gathered(near: NearStore) -> Path:
    """The folder in which a spare finds one."""
    found = newest(gather(near, save(near, REPLICATED, "per-rank")))
    assert found
    return found


def names(store: Store) -> list[str]:
    return sorted(entry.name for entry in store.path.iterdir())


@pytest.mark.parametrize("cut", [REPLICATED, [Shard(0)], [Shard(1)]])
def test_it_is_the_file_that_the_ranks_would_have_written(
    near: NearStore, store: Store, tmp_path: Path, cut: list[Placement] | None
) -> None:
    theirs = Store(tmp_path / "theirs").create()
    save(theirs, cut, "shared")
    found = newest(gather(near, save(near, cut, "per-rank")))
    assert found
    drained = drain(found, drainer(store))
    assert store.committed() == []
    mine = store.take_in(drained.folder.name, drained.step)
    [expected] = theirs.committed()
    assert mine.state.read_bytes() == expected.state.read_bytes()
    assert mine.metrics == expected.metrics == {"loss": 0.5}
    assert names(store) == ["step-000000000120"]


def test_it_has_the_layout_that_the_user_wants(gathered: Path, store: Store) -> None:
    drained = drain(gathered, drainer(store, "per-rank"))
    one = store.take_in(drained.folder.name, drained.step)
    assert sorted(file.name for file in one.path.glob("*.h5")) == ["shard-00000.h5", STATE]
    step, tree = load(one.state, ENGINE)
    wanted = state_of((RANKS,), REPLICATED, 0)
    assert step == STEP
    for name, tensor in wanted["model"].items():
        assert torch.equal(tree["model"][name], tensor)
    with h5py.File(one.state) as file:
        assert file["model/even"].shape == (512, 64)
        assert file["model/even"][0, 0] == wanted["model"]["even"][0, 0]


def test_what_is_torn_is_not_committed(gathered: Path, store: Store) -> None:
    with opened(gathered / STATE) as found:
        pieces = (piece for leaf in range(6) for piece in found.index.pieces(leaf))
        piece = next(one for one in pieces if found.index.files[one.file].name == shard(1))
        path = found.index.specs[piece.leaf].path
    with (gathered / shard(1)).open("r+b") as file:
        file.seek(piece.offset + 77)
        byte = file.read(1)
        file.seek(piece.offset + 77)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(SaveFailed, match=rf"damaged are {path}, in shard-00001\.h5"):
        drain(gathered, drainer(store))
    assert store.committed() == []
    store.sweep()
    assert names(store) == []


@pytest.mark.parametrize("size", [0, 1, 4095, 4096 * 3])
def test_what_ends_too_early_is_not_read(gathered: Path, store: Store, size: int) -> None:
    os.truncate(gathered / shard(2), size)
    assert newest(NearStore(gathered.parent.parent)) == gathered
    with pytest.raises(Damaged, match="should have"):
        drain(gathered, drainer(store))


def test_what_is_not_all_there_is_waited_for(near: NearStore) -> None:
    name = save(near, REPLICATED, "per-rank")
    files = [METRICS, shard(0), STATE, shard(2), shard(1)]
    for file in files:
        there = gather(near, name, [file])
        assert (newest(there) is None) == (file != files[-1])


def test_of_several_the_newest_that_is_all_there_comes_first(near: NearStore) -> None:
    first = save(near, REPLICATED, "per-rank", 1)
    near.kept = frozenset([first])
    second = save(near, REPLICATED, "per-rank", 2)
    there = gather(near, first)
    gather(near, second, [STATE])
    assert newest(there) == there.path / first / "copies"
    there.clear_up_to(first)
    assert newest(there) is None
    gather(near, second, [shard(rank) for rank in range(RANKS)])
    assert newest(there) == there.path / second / "copies"


def test_saves_that_follow_leave_alone_what_is_being_drained(
    near: NearStore, gathered: Path, store: Store
) -> None:
    before = {file.name: file.read_bytes() for file in gathered.iterdir()}
    for step in (121, 122, 123):
        # None of them is kept, so that each would use the files of the one before again.
        near.clear(near.path / save(near, REPLICATED, "per-rank", step))
    assert {file.name: file.read_bytes() for file in gathered.iterdir()} == before
    drain(gathered, drainer(store))


def test_of_two_that_write_one_is_committed(gathered: Path, store: Store, tmp_path: Path) -> None:
    first = drain(gathered, drainer(store))
    # To who begins later what lies there is what somebody has left.
    second = drain(gathered, drainer(store))
    with pytest.raises(FileNotFoundError):
        store.take_in(first.folder.name, STEP)
    store.take_in(second.folder.name, STEP)
    assert names(store) == ["step-000000000120"]


def test_one_that_is_swept_in_the_middle_fails(
    gathered: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Save.advance

    def swept(saving: Save, waiting: bool = False) -> bool:
        store.sweep()
        return advance(saving, waiting)

    monkeypatch.setattr(Save, "advance", swept)
    with pytest.raises(SaveFailed, match="No such file"):
        drain(gathered, drainer(store))
    assert names(store) == []


def test_saves_of_the_ranks_and_drains_leave_each_other_alone(
    near: NearStore, gathered: Path, store: Store
) -> None:
    drained = drain(gathered, drainer(store))
    save(store, REPLICATED, "shared", 121)
    store.take_in(drained.folder.name, STEP)
    assert [one.step for one in store.committed()] == [STEP, 121]
    begun = store.begin(122)
    again = drain(gathered, drainer(store))
    assert begun.exists()
    # Of the same step as one that is there already.
    assert store.take_in(again.folder.name, STEP).edition == 2


@pytest.mark.parametrize("name", ["../elsewhere", ".aside-01234567", "step-000000000120", ""])
def test_nothing_else_is_taken_in(store: Store, name: str) -> None:
    (store.path / "step-000000000120").mkdir()
    with pytest.raises(FileNotFoundError):
        store.take_in(name, 7)
    with pytest.raises(FileNotFoundError):
        store.refuse(name)
    assert names(store) == ["step-000000000120"]


# -- how often -------------------------------------------------------------------------------


class Nowhere:
    """A shelf on which only steps are noted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[int] = []

    def begin(self, step: int) -> Path:
        folder = self.path / str(step)
        folder.mkdir()
        return folder

    def join(self, folder: Path, own: str | None) -> None:
        pass

    def commit(self, folder: Path, step: int, metrics: object = None) -> Checkpoint:
        self.steps.append(step)
        return Checkpoint(step, 1, folder)


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, 40)), st.integers(2, 7))
def test_there_is_one_in_each_interval_whatever_spares_do(
    tmp_path_factory: pytest.TempPathFactory, drained: set[int], every: int
) -> None:
    """``drained``: after these steps a spare has written what was chosen last, if anything."""
    shelf = Nowhere(tmp_path_factory.mktemp("shelf"))
    written = [-1]
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    hooks = Hooks(
        nothing,
        nothing,
        nothing,
        nothing,
        contextlib.nullcontext,
        elsewhere=lambda since: (written[-1] >= since, awaited == -1),
    )
    series = Series(Saver(shelf, Alone(), ENGINE), every, False, False, hooks)
    state = hpcft.State(model=torch.nn.Linear(2, 2))
    series.attach(Alone(), 0, soon=False)
    chosen = awaited = -1
    for step in range(1, 41):
        state.__dict__["step"] = step
        before = len(shelf.steps)
        series.edge(state, {})
        series.wait()
        if chosen < series.since <= step:
            assert awaited == -1
            chosen = awaited = step
        if step in drained and awaited >= 0:
            written.append(chosen)
            awaited = -1
        if step % every == 0 and step in written:
            # The ranks were spared at this very step, else it would not have been chosen.
            assert len(shelf.steps) == before
    both = [*shelf.steps, *written]
    for end in range(every, 41, every):
        assert any(end - every <= one <= end and one > 0 for one in both), (end, both)
    # And none that nobody has asked for.
    assert all(step % every == 0 for step in shelf.steps)
    assert len(both) - 1 <= 2 * (40 // every) + 1


# -- who, and how it gets there --------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "active", "retiring", "who"),
    [
        ("aaa", {0, 1}, set(), 2),
        # Rather where nobody trains.
        ("aabbcc", {0, 1, 2}, set(), 4),
        ("aabbcc", {0, 1, 2}, {4}, 5),
        ("aabb", {0, 2, 3}, set(), 1),
        ("aab", {0, 1, 2}, set(), None),
    ],
)
def test_one_spare_writes(
    nodes: str, active: set[int], retiring: set[int], who: int | None
) -> None:
    every = fleets(nodes)
    for fleet in every:
        for rank in retiring:
            fleet.announce("retire", rank)
    found = {peer and peer.rank for fleet in every if (peer := fleet.drainer(active)) or True}
    assert found == {who}


def test_a_spare_that_has_died_writes_nothing() -> None:
    first, *_ = fleets("aaaa")
    first.announce("dead", 2)
    drainer = first.drainer({0, 1})
    assert drainer
    assert drainer.rank == 3


@pytest.mark.parametrize("copies", ["partner", "none", "xor"])
@pytest.mark.parametrize("nodes", ["abc", "aab", "aaa"])
def test_what_is_chosen_is_gathered_where_the_spare_is(
    tmp_path: Path, nodes: str, copies: str
) -> None:
    """From ranks 0 and 1 to spare 2; by links where its node has the bytes already."""
    stores = {node: NearStore(tmp_path / node) for node in nodes}
    told: dict[int, Message] = {}
    failed: list[str] = []
    made: list[Copies] = []
    gathered: list[NearStore] = []
    name = "000000000007-0123abcd"
    content = {shard(0): bytes(5000), shard(1): b"1" * 7000, METRICS: b"{}", STATE: b"state"}

    async def story() -> None:
        listeners = [Listener("127.0.0.1") for _ in nodes]
        peers = [
            listener.peer(Place(rank, 3, nodes[rank], nodes[rank], "127.0.0.1"))
            for rank, listener in enumerate(listeners)
        ]
        every = [Fleet(rank, peers, 30.0, *[lambda _: None] * 4) for rank in range(3)]
        couriers = [Courier(rank, [stores[nodes[rank]]]) for rank in range(3)]
        for courier, listener in zip(couriers, listeners, strict=True):
            await courier.listen(listener.courier, b"secret")
        await asyncio.gather(
            *(f.join(ls, b"secret") for f, ls in zip(every, listeners, strict=True))
        )
        answered = asyncio.Event()
        for rank, files in enumerate([[METRICS, shard(0), STATE], [shard(1)]]):
            folder = stores[nodes[rank]].path / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                (folder / file).write_bytes(content[file])

            def tell(message: Message, rank: int = rank) -> None:
                told[rank] = message
                if len(told) == 2:
                    answered.set()

            tier = Tier(5, False, str(tmp_path), copies)
            made.append(
                Copies(
                    couriers[rank],
                    every[rank],
                    Crew({0, 1}),
                    [tier],
                    tell,
                    True,
                    lambda checkpoint, why: failed.append(why),
                )
            )
            made[-1].make(0, name, files, drained=True)
        await answered.wait()
        assert couriers[2].gathered
        gathered.append(couriers[2].gathered)
        every[0].announce("end", 0)
        await asyncio.gather(*(fleet.leave() for fleet in every))
        for courier in couriers:
            courier.close()

    asyncio.run(story())
    assert failed == []
    assert [told[rank]["why"] for rank in (0, 1)] == ["", ""]
    [folder] = gathered[0].gathered()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == content
    twice = {file.name for file in folder.iterdir() if file.stat().st_nlink == 2}
    there = set() if copies == "none" and nodes != "aaa" else set(content)
    if copies == "xor" and nodes == "abc":
        # Parity of the others; of nodes that train there is but one in the other cases.
        there = {METRICS, STATE}
    assert twice == there
