"""Carries files to other nodes: copies of checkpoints, or parity, for when this node is lost.

A connection of its own, proved as those of the shepherds are, for every batch of files. The sender
names tier, checkpoint, file and size, waits for the word that there is room, and the bytes follow;
the receiver answers when it has them all. A copy does not go through Python: the kernel sends from
the file, and receives into memory that is the file. What a spare is to drain is gathered on its
node in a place of its own: by copies, or where the files are there already by further names for
them, which cost neither time nor memory. Of parity (:mod:`hpcft.ckpt.parity`) each
member of a set gets its chunks of each other's file.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hpcft.ckpt._engine import exclusive_or
from hpcft.ckpt.near import NearStore
from hpcft.ckpt.parity import CHUNK, Parity, chunks, stripes
from hpcft.launch.channel import (
    LINE_LIMIT,
    Connection,
    Message,
    Refused,
    authenticate,
    connect,
)


@dataclass(frozen=True)
class Address:
    """Where another shepherd's courier listens."""

    rank: int
    address: str
    port: int


@dataclass
class _Gathering:
    """Parity that is being put together.

    files: names and sizes of those of which it has everything, by rank.
    """

    members: tuple[int, ...]
    path: Path
    files: dict[int, tuple[str, int]] = field(default_factory=dict)


class Courier:
    """This shepherd's end.

    Parameters
    ----------
    rank: the shepherd's.
    stores: this node's part of each tier.

    Attributes
    ----------
    gathered: where on this node what a spare is to drain comes to lie, once it listens.
    refused: why nothing is taken in at present; empty if it is.
    """

    def __init__(self, rank: int, stores: Sequence[NearStore]) -> None:
        self._rank = rank
        self._stores = stores
        self.gathered: NearStore | None = None
        self.refused = ""
        self._server: asyncio.Server | None = None
        self._secret = b""
        #: By tier and checkpoint.
        self._gathering: dict[tuple[int, str], _Gathering] = {}

    async def listen(self, sock: socket.socket, secret: bytes) -> None:
        """Take in what others send to ``sock``, as long as this process lives."""
        self._secret = secret
        if self._stores:
            # Nobody learns the secret from it.
            self.gathered = self._stores[0].gathering(hashlib.sha256(secret).hexdigest()[:8])
        self._server = await asyncio.start_server(self._accept, sock=sock, limit=LINE_LIMIT)

    def close(self) -> None:
        """Take in nothing any more."""
        if self._server:
            self._server.close()

    async def send(
        self, to: Address, tier: int, checkpoint: str, files: Sequence[str], gather: bool = False
    ) -> None:
        """Have another node keep copies of files of a checkpoint.

        Parameters
        ----------
        gather: for a spare to drain.

        Raises
        ------
        OSError: that cannot be done; says why.
        """
        async with self._connected(to) as connection:
            for name in files:
                with self._open(tier, checkpoint, name) as file:
                    size = os.fstat(file.fileno()).st_size
                    await _ask(connection, tier, checkpoint, file=name, size=size, gather=gather)
                    await connection.send_file(file)
                    await _answer(connection)
            if not gather:
                await _ask(connection, tier, checkpoint)

    def gather(self, tier: int, checkpoint: str, files: Sequence[str], copies: bool) -> None:
        """Have files that are on this node be there for a spare to drain, too.

        Parameters
        ----------
        copies: they are of another node's ranks.

        Raises
        ------
        OSError: that cannot be done.
        """
        assert self.gathered is not None
        for name in files:
            with suppress(FileExistsError):
                self._stores[tier].lend(checkpoint, name, copies, self.gathered)

    async def have_gathered(
        self, to: Address, tier: int, checkpoint: str, files: Sequence[str]
    ) -> None:
        """As :meth:`gather`, of copies that another node has.

        Raises
        ------
        OSError: that cannot be done; says why.
        """
        async with self._connected(to) as connection:
            await _ask(connection, tier, checkpoint, gathered=list(files))

    async def send_parity(
        self, members: Sequence[Address], tier: int, checkpoint: str, name: str
    ) -> None:
        """Have the others of a set keep parity of a file of a checkpoint.

        Parameters
        ----------
        members: all of the set, this one included, in order.
        name: of the file; empty: this member has none.

        Raises
        ------
        OSError: that cannot be done; says why.
        """
        ranks = [member.rank for member in members]

        async def send(to: Address) -> None:
            async with self._connected(to) as connection:
                if not name:
                    await _ask(connection, tier, checkpoint, members=ranks, parity="", size=0)
                    await _answer(connection)
                    return
                with self._open(tier, checkpoint, name) as file:
                    size = os.fstat(file.fileno()).st_size
                    await _ask(connection, tier, checkpoint, members=ranks, parity=name, size=size)
                    for stretch in chunks(size, ranks, self._rank, to.rank):
                        await connection.send_file(file, stretch)
                    await _answer(connection)

        await asyncio.gather(*(send(to) for to in members if to.rank != self._rank))

    def _open(self, tier: int, checkpoint: str, name: str) -> BinaryIO:
        return (self._stores[tier].path / checkpoint / name).open("rb")

    @asynccontextmanager
    async def _connected(self, to: Address) -> AsyncIterator[Connection]:
        connection = await connect(to.address, to.port, self._secret, self._rank)
        try:
            yield connection
        finally:
            await connection.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            connection = await authenticate(reader, writer, self._secret, self._rank, listener=True)
        except Refused:
            return
        try:
            while message := await connection.receive():
                try:
                    await self._take(connection, message)
                    connection.send({"why": ""})
                except (OSError, ValueError) as error:
                    # The bytes may be half way: no other file can follow.
                    connection.send({"why": str(error) or type(error).__name__})
                    return
        except OSError:
            return
        finally:
            await connection.close()

    async def _take(self, connection: Connection, message: Message) -> None:
        if self.refused:
            raise OSError(self.refused)
        store, checkpoint = self._stores[message["tier"]], message["checkpoint"]
        if "members" in message:
            await self._take_parity(connection, store, message)
        elif "gathered" in message:
            self.gather(message["tier"], checkpoint, message["gathered"], copies=True)
        elif "file" in message:
            into = self.gathered if message["gather"] else store
            assert into is not None
            await _take_copy(connection, into.room(checkpoint, message["file"]), message["size"])
        else:
            store.clear_copies(checkpoint)

    async def _take_parity(
        self, connection: Connection, store: NearStore, message: Message
    ) -> None:
        checkpoint, size, source = message["checkpoint"], message["size"], connection.peer
        members = tuple(message["members"])
        key = message["tier"], checkpoint
        if self._rank not in members or source not in members or source == self._rank:
            raise ValueError(f"{self._rank} and {source} are not both in the set {members}")
        for old in [k for k in self._gathering if k[0] == key[0] and k[1] < checkpoint]:
            # Those of its set that were missing will not come any more.
            del self._gathering[old]
        gathering = self._gathering.get(key)
        if gathering is None:
            path = store.room_for_parity(checkpoint, self._rank)
            gathering = self._gathering[key] = _Gathering(members, path)
            path.write_bytes(b"")
        if gathering.members != members:
            raise ValueError(f"sets differ: {gathering.members} and {members}")
        with gathering.path.open("r+b") as file:
            length = stripes(size, len(members)) * CHUNK
            if os.fstat(file.fileno()).st_size < length:
                os.posix_fallocate(file.fileno(), 0, length)
            connection.send({"why": ""})
            if length:
                with mmap.mmap(file.fileno(), length) as memory:
                    await _take_chunks(connection, memory, size, members, source, self._rank)
        gathering.files[source] = str(message["parity"]), size
        if len(gathering.files) == len(members) - 1:
            del self._gathering[key]
            # Its own file does not count: the others keep the parity of that.
            files = [gathering.files.get(member, ("", 0)) for member in members]
            names, sizes = zip(*files, strict=True)
            store.keep_parity(checkpoint, Parity(self._rank, members, names, sizes))


async def _take_chunks(
    connection: Connection,
    parity: mmap.mmap,
    size: int,
    members: Sequence[int],
    source: int,
    keeper: int,
) -> None:
    room = memoryview(bytearray(CHUNK))
    for stripe, stretch in enumerate(chunks(size, members, source, keeper)):
        await connection.receive_into(room[: len(stretch)])
        with memoryview(parity) as whole, whole[stripe * CHUNK :] as rest:
            exclusive_or(rest, room[: len(stretch)])


async def _take_copy(connection: Connection, target: Path, size: int) -> None:
    aside = target.with_name(f".{target.name}")
    try:
        with aside.open("w+b") as file:
            # So that a full file system is an error here, and not a signal later.
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
            connection.send({"why": ""})
            if size:
                with mmap.mmap(file.fileno(), size) as memory, memoryview(memory) as view:
                    await connection.receive_into(view)
        aside.rename(target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


async def _ask(connection: Connection, tier: int, checkpoint: str, **what: object) -> None:
    """Say what follows, and wait until the other end is ready for it, or has done it."""
    connection.send({"tier": tier, "checkpoint": checkpoint, **what})
    await _answer(connection)


async def _answer(connection: Connection) -> None:
    answer = await connection.receive()
    if answer is None:
        raise ConnectionError("the other node has closed the connection")
    if answer["why"]:
        raise OSError(answer["why"])
