"""Authenticated connections between the shepherds of one run.

A connection carries JSON objects, one a line. Both ends first prove that they know the run's
secret (HMAC-SHA256 over the other's nonce, RFC 2104); what does not is dropped before a message of
it is read. The secret is made by rank 0 and travels over MPI, which is up by then.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
from typing import Any, BinaryIO, Protocol

Message = dict[str, Any]


class HasOptions(Protocol):
    """A socket, or what asyncio has in its place."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes: ...


#: A message is small; more than this in a line is not one of ours.
LINE_LIMIT = 1 << 20
#: Bytes received at a time that go past the stream.
_AT_ONCE = 1 << 20
#: Seconds in which a stranger has to prove itself.
_HANDSHAKE_TIME = 5.0


def of_this_user(connection: HasOptions) -> bool:
    """Whether who is at the other end of a Unix socket's connection is this process's user."""
    layout = struct.Struct("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    _, user, _ = layout.unpack(found)
    return bool(user == os.getuid())


class Refused(ConnectionError):
    """The other end does not know the secret."""


class Connection:
    """One authenticated connection to the shepherd of rank ``peer``."""

    def __init__(
        self, peer: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.peer = peer
        self._reader = reader
        self._writer = writer

    def send(self, message: Message) -> None:
        """Send without waiting. A peer that does not read is found by its silence, not here."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> Message | None:
        """The next message, or None when the other end's process has closed the connection.

        Raises
        ------
        OSError: the connection broke for another reason, which proves nothing about the process.
        """
        try:
            line = await self._reader.readline()
        except ConnectionResetError:
            return None
        except ValueError as error:
            raise ConnectionError(f"not a message: {error}") from error
        if not line.endswith(b"\n"):
            return None
        message: Message = json.loads(line)
        return message

    async def send_file(self, file: BinaryIO, stretch: range | None = None) -> None:
        """Send a file's bytes; they do not come through this process.

        Parameters
        ----------
        stretch: which of them; None: all.

        Raises
        ------
        OSError: the connection broke, or the file cannot be read.
        """
        await self._writer.drain()
        offset, count = (stretch.start, len(stretch)) if stretch else (0, None)
        loop = asyncio.get_running_loop()
        await loop.sendfile(self._writer.transport, file, offset, count)

    async def receive_into(self, memory: memoryview) -> None:
        """Receive bytes until ``memory`` is full; the other end sends them when told to.

        Raises
        ------
        OSError: the connection broke before that.
        """
        # Past the stream, which would copy them twice. Nothing is waiting in it: what it has read
        # was a line.
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        intake = _Intake(memory, transport)
        try:
            await intake.full
        finally:
            intake.leave()

    async def close(self) -> None:
        """Send what is pending and close."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), 1)
        except (OSError, asyncio.TimeoutError):
            self._writer.transport.abort()


class _Intake(asyncio.BufferedProtocol):
    """Takes the place of a stream until some memory is full."""

    def __init__(self, memory: memoryview, transport: asyncio.Transport) -> None:
        self.full: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._memory = memory
        self._at = 0
        self._transport = transport
        self._before = transport.get_protocol()
        transport.set_protocol(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        # Never more than what is missing: what follows is the stream's.
        return self._memory[self._at : self._at + _AT_ONCE]

    def buffer_updated(self, nbytes: int) -> None:
        self._at += nbytes
        if self._at == len(self._memory):
            self.leave()
            self.full.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.full.done():
            self.full.set_exception(error or ConnectionError("the connection was closed"))
        self._before.connection_lost(error)

    def pause_writing(self) -> None:
        self._before.pause_writing()

    def resume_writing(self) -> None:
        self._before.resume_writing()

    def leave(self) -> None:
        """Give the connection back to the stream."""
        if self._transport.get_protocol() is self:
            self._transport.set_protocol(self._before)


def _proof(secret: bytes, role: str, rank: int, nonce: str) -> str:
    return hmac.new(secret, f"{role} {rank} {nonce}".encode(), hashlib.sha256).hexdigest()


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: bytes,
    rank: int,
    role: str,
    other: str,
) -> Connection:
    async def line() -> Message:
        message = json.loads(await reader.readline())
        if not isinstance(message, dict):
            raise ValueError("not an object")
        return message

    def send(message: Message) -> None:
        writer.write(json.dumps(message).encode() + b"\n")

    nonce = secrets.token_hex(16)
    send({"nonce": nonce, "rank": rank})
    hello = await line()
    peer = int(hello["rank"])
    send({"proof": _proof(secret, role, rank, str(hello["nonce"]))})
    proof = str((await line())["proof"])
    if not hmac.compare_digest(proof, _proof(secret, other, peer, nonce)):
        raise Refused("wrong secret")
    return Connection(peer, reader, writer)


async def authenticate(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    secret: bytes,
    rank: int,
    *,
    listener: bool,
) -> Connection:
    """Prove ourselves to the other end and have it prove itself.

    Parameters
    ----------
    secret: the run's secret.
    rank: this shepherd's rank.
    listener: whether this end accepted the connection; the two ends' proofs differ by it, so that
        neither can be echoed back.

    Raises
    ------
    Refused: the other end did not prove itself; the connection is closed.
    """
    role, other = ("listener", "caller") if listener else ("caller", "listener")
    try:
        return await asyncio.wait_for(
            _exchange(reader, writer, secret, rank, role, other), _HANDSHAKE_TIME
        )
    except Exception as error:
        # A stranger may send anything, and so cause any error.
        writer.close()
        raise Refused(str(error)) from error


async def connect(address: str, port: int, secret: bytes, rank: int) -> Connection:
    """Connect to the shepherd listening at ``address`` (an abstract Unix socket if port is 0)."""
    if port:
        opening = asyncio.open_connection(address, port, limit=LINE_LIMIT)
    else:
        opening = asyncio.open_unix_connection("\0" + address, limit=LINE_LIMIT)
    reader, writer = await opening
    return await authenticate(reader, writer, secret, rank, listener=False)
