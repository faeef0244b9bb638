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
import secrets
from typing import Any

Message = dict[str, Any]

#: A message is small; more than this in a line is not one of ours.
LINE_LIMIT = 1 << 20
#: Seconds in which a stranger has to prove itself.
_HANDSHAKE_TIME = 5.0


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

    async def close(self) -> None:
        """Send what is pending and close."""
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), 1)
        except (OSError, asyncio.TimeoutError):
            self._writer.transport.abort()


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
