"""Standing between a rank and its PMIx server.

Both Slurm's PMIx plugin and PRRTE end the whole job on an alarm: the connection of a process is
lost, or a process reports that another has failed (which ULFM does whenever it learns of one). So
the rank is given our address for the server's; what either side says is passed on, except:

* reports of failures (PMIx's "notify event" command) stop here;
* when the rank dies, its connection to the server stays open until :meth:`Relay.close`, which takes
  leave in the rank's place.

Facts this relies on, of OpenPMIx 4 and 5 (``src/include/pmix_globals.h``, ``src/mca/ptl``,
``src/mca/bfrops``): the server's address is in ``PMIX_SERVER_URI*``; a connection carries messages
of a 16-byte header, four integers: the client's index, the tag a reply is to bear, the payload's
length, nothing; big-endian but in the introduction, the first, where they are in the machine's own
order. The payload of a client's request begins with the command, packed as ``02 <command>``.
Whatever does not look like that is passed on untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
from collections.abc import Mapping

_HEADER = struct.Struct(">iIII")
#: The introduction's is in the machine's own byte order.
_INTRODUCTION = struct.Struct("=iIII")
# pmix_cmd_t in src/include/pmix_globals.h.
_FINALIZE = 5
_NOTIFY_EVENT = 12
#: A client's message is far smaller; a "length" above this is none.
_LARGEST = 1 << 28
#: Seconds the server has to answer a leave-taking.
_PATIENCE = 2.0


class Filter:
    """Cuts a client's messages out of the bytes it sends, and leaves out the alarms.

    The first message introduces the client and is of another form; it always passes.
    """

    def __init__(self) -> None:
        self._held = b""
        self._first = True
        self._lost_track = False
        #: Number of messages left out so far.
        self.dropped = 0
        #: Whether the client has taken leave itself.
        self.finalized = False
        self._index = self._tag = 0

    def feed(self, data: bytes) -> bytes:
        """Take bytes from the client; return those to be passed on now."""
        if self._lost_track:
            return data
        self._held += data
        passed = []
        while len(self._held) >= _HEADER.size:
            header = _INTRODUCTION if self._first else _HEADER
            length = header.unpack_from(self._held)[2]
            if length > _LARGEST:
                self._lost_track = True
                passed.append(self._held)
                self._held = b""
                break
            whole = _HEADER.size + length
            if len(self._held) < whole:
                break
            message, self._held = self._held[:whole], self._held[whole:]
            command = None if self._first else command_of(message)
            if not self._first:
                self._index, self._tag, _, _ = _HEADER.unpack_from(message)
            self._first = False
            self.finalized |= command == _FINALIZE
            if command == _NOTIFY_EVENT:
                self.dropped += 1
            else:
                passed.append(message)
        return b"".join(passed)

    def farewell(self) -> bytes | None:
        """The message that takes leave in the client's place; None if it has none to take."""
        if self._first or self._lost_track or self.finalized or not self._tag:
            return None
        # The command and an empty list of attributes.
        payload = bytes((2, _FINALIZE, 2, 0))
        return _HEADER.pack(self._index, (self._tag + 1) % 2**32, len(payload), 0) + payload


def command_of(message: bytes) -> int | None:
    """The command of a client's request, None if ``message`` does not look like one."""
    payload = message[_HEADER.size : _HEADER.size + 2]
    # The count of values (1, as a zigzag integer), then the value.
    return payload[1] if len(payload) == 2 and payload[0] == 2 else None


class Relay:
    """One rank's relay; see the module. To be made with :meth:`start`.

    Attributes
    ----------
    environ: the environment to start the rank with: the server's address is ours.
    """

    def __init__(self) -> None:
        self.environ: dict[str, str] = {}
        self._server: tuple[str, int] | None = None
        self._listener: asyncio.Server | None = None
        self._sessions: list[_Session] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    async def start(cls, environ: Mapping[str, str]) -> Relay:
        """Begin to listen for the rank.

        Parameters
        ----------
        environ: the environment the launcher gave, with the server's address in it.
        """
        self = cls()
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        ours = f"tcp4://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        self.environ = dict(environ)
        for name, value in environ.items():
            found = re.search(r"tcp4://([\d.]+):(\d+)", value)
            if name.startswith("PMIX_SERVER_URI") and found:
                self._server = (found[1], int(found[2]))
                self.environ[name] = value[: found.start()] + ours + value[found.end() :]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:
            writer.close()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection(*self._server)
        except OSError:
            writer.close()
            return
        session = _Session(up_reader, up_writer)
        self._sessions.append(session)
        for coroutine in (session.up(reader), session.down(writer)):
            task = asyncio.get_running_loop().create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Take leave from the server in the rank's place, so that nobody is alarmed."""
        if self._listener:
            self._listener.close()
        await asyncio.gather(*(session.leave() for session in self._sessions))
        for task in self._tasks:
            task.cancel()


class _Session:
    """One connection of the rank's, passed on to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._filter = Filter()
        self._closed = asyncio.Event()
        self._answered = asyncio.Event()

    async def up(self, rank: asyncio.StreamReader) -> None:
        """Pass on what the rank says. When it is gone the server is not told."""
        with contextlib.suppress(OSError):
            while data := await rank.read(1 << 16):
                self._writer.write(self._filter.feed(data))

    async def down(self, rank: asyncio.StreamWriter) -> None:
        """Pass on what the server says. When it is gone the rank is not told, and goes on."""
        with contextlib.suppress(OSError):
            while data := await self._reader.read(1 << 16):
                # Read on after the rank's death, lest the server be stuck in sending.
                self._answered.set()
                if not rank.is_closing():
                    rank.write(data)
        self._closed.set()

    async def leave(self) -> None:
        """End the session by agreement with the server."""
        farewell = self._filter.farewell()
        if farewell and not self._closed.is_set():
            self._answered.clear()
            self._writer.write(farewell)
            waits = [asyncio.ensure_future(e.wait()) for e in (self._answered, self._closed)]
            await asyncio.wait(waits, timeout=_PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        self._writer.close()
