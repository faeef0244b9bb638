"""A shepherd's connection to its rank; the rank's end is in :mod:`hpcft.world.link`."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

from hpcft.launch.channel import Message

#: Bytes that a message has at most: the addresses of all shepherds are one.
_LIMIT = 1 << 24


class Link:
    """The shepherd's end.

    Attributes
    ----------
    theirs: the rank's, to be closed here once the rank has it.
    """

    def __init__(
        self, theirs: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.theirs = theirs
        self._reader = reader
        self._writer = writer

    @classmethod
    async def create(cls) -> Link:
        """Make both ends."""
        ours, theirs = socket.socketpair()
        return cls(theirs, *await asyncio.open_unix_connection(sock=ours, limit=_LIMIT))

    def tell(self, message: Message) -> None:
        """Send the rank a message, if it is still there."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """Neither tell nor hear anything any more."""
        self._writer.close()

    async def messages(self) -> AsyncIterator[Message]:
        """What the rank says, until its end.

        Raises
        ------
        OSError: it was killed, and has left a broken pipe behind.
        """
        while line := await self._reader.readline():
            yield json.loads(line)
