"""Who is let into the conversation of the shepherds, and who is not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from hpcft.launch import channel
from hpcft.launch.channel import Connection, Refused, authenticate, connect

SECRET, OTHER = b"the run's secret", b"another run's secret"

both_ends = pytest.mark.parametrize("listener", [True, False], ids=["listener", "caller"])
both_kinds = pytest.mark.parametrize("kind", ["tcp", "unix"])


@dataclass
class End:
    """One end of a connection, before anything is proved."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def prove(self, secret: bytes, rank: int, listener: bool) -> Connection:
        return await authenticate(self.reader, self.writer, secret, rank, listener=listener)


async def pair() -> tuple[End, End]:
    ours, theirs = socket.socketpair()
    return (
        End(*await asyncio.open_connection(sock=ours)),
        End(*await asyncio.open_connection(sock=theirs)),
    )


@contextlib.asynccontextmanager
async def listening(kind: str, secret: bytes) -> AsyncIterator[tuple[str, int, asyncio.Queue]]:  # type: ignore[type-arg]
    """Shepherd 0, listening: its address, its port, and what became of each caller."""
    callers: asyncio.Queue[Connection | Refused] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await callers.put(await authenticate(reader, writer, secret, 0, listener=True))
        except Refused as refused:
            await callers.put(refused)

    if kind == "tcp":
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        address, port = server.sockets[0].getsockname()
    else:
        address, port = f"hpcft-test-{secrets.token_hex(8)}", 0
        server = await asyncio.start_unix_server(accept, "\0" + address)
    yield address, port, callers
    server.close()


def run(check: Callable[[], Awaitable[None]], seconds: float = 10) -> None:
    async def limited() -> None:
        await asyncio.wait_for(check(), seconds)

    asyncio.run(limited())


@both_kinds
def test_two_that_know_the_secret_talk(kind: str) -> None:
    async def check() -> None:
        async with listening(kind, SECRET) as (address, port, callers):
            there = await connect(address, port, SECRET, 7)
            here = await callers.get()
            assert isinstance(here, Connection)
            assert (here.peer, there.peer) == (7, 0)
            messages = [{"fact": "dead", "rank": 3}, {}, {"cause": "ü\n\0", "at": [1.5, None]}]
            for message in messages:
                there.send(message)
                here.send({"seen": message})
            assert [await here.receive() for _ in messages] == messages
            assert [await there.receive() for _ in messages] == [{"seen": m} for m in messages]
            # What was said before closing still arrives.
            there.send({"last": True})
            await there.close()
            assert await here.receive() == {"last": True}
            assert await here.receive() is None
            there.send({"too": "late"})
            await here.close()

    run(check)


@both_kinds
def test_a_message_of_many_reads_arrives_whole(kind: str) -> None:
    async def check() -> None:
        async with listening(kind, SECRET) as (address, port, callers):
            there = await connect(address, port, SECRET, 1)
            here = await callers.get()
            message = {"cause": "x" * 500_000}
            here.send(message)
            assert await there.receive() == message

    run(check)


@both_kinds
def test_those_of_two_runs_refuse_each_other(kind: str) -> None:
    async def check() -> None:
        async with listening(kind, SECRET) as (address, port, callers):
            with pytest.raises(Refused):
                await connect(address, port, OTHER, 1)
            assert isinstance(await callers.get(), Refused)
            # The listener is there for others afterwards.
            await connect(address, port, SECRET, 1)
            assert isinstance(await callers.get(), Connection)

    run(check)


async def refuses(listener: bool, stranger: Callable[[End], Awaitable[None]]) -> None:
    """Shepherd 4 refuses ``stranger``, and hangs up on it."""
    ours, theirs = await pair()
    behaving = asyncio.ensure_future(stranger(theirs))
    with pytest.raises(Refused):
        await ours.prove(SECRET, 4, listener)
    await behaving
    # Whatever is still on its way, the end comes.
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(theirs.reader.read(), 2)
    assert theirs.reader.at_eof() or theirs.reader.exception() is not None
    assert ours.writer.is_closing()


@both_ends
def test_a_stranger_that_makes_up_its_proof_is_refused(listener: bool) -> None:
    async def stranger(end: End) -> None:
        end.writer.write(b'{"nonce": "0", "rank": 1}\n')
        await end.reader.readline()
        # A proof that would do if the secret were not asked for.
        proof = channel._proof(b"", "caller" if listener else "listener", 1, "0")
        end.writer.write(json.dumps({"proof": proof}).encode() + b"\n")

    run(lambda: refuses(listener, stranger))


@both_ends
def test_a_stranger_that_echoes_what_we_say_is_refused(listener: bool) -> None:
    async def stranger(end: End) -> None:
        for _ in range(2):
            end.writer.write(await end.reader.readline())

    run(lambda: refuses(listener, stranger))


@both_ends
def test_one_that_passes_two_of_the_same_side_on_to_each_other_is_refused(listener: bool) -> None:
    async def check() -> None:
        (one, to_one), (two, to_two) = await pair(), await pair()

        async def pass_on(source: End, target: End) -> None:
            while line := await source.reader.readline():
                target.writer.write(line)

        between = [
            asyncio.ensure_future(pass_on(*ends)) for ends in ((to_one, to_two), (to_two, to_one))
        ]
        results = await asyncio.gather(
            one.prove(SECRET, 1, listener), two.prove(SECRET, 2, listener), return_exceptions=True
        )
        assert [type(result) for result in results] == [Refused, Refused]
        await asyncio.gather(*between, return_exceptions=True)

    run(check)


@both_ends
def test_who_knows_the_secret_cannot_be_passed_off_as_another_rank(listener: bool) -> None:
    async def check() -> None:
        friend, wire = await pair()

        async def stranger(end: End) -> None:
            wire.writer.write(await end.reader.readline())
            hello = json.loads(await wire.reader.readline())
            end.writer.write(json.dumps({**hello, "rank": 2}).encode() + b"\n")
            wire.writer.write(await end.reader.readline())
            end.writer.write(await wire.reader.readline())

        proving = asyncio.ensure_future(friend.prove(SECRET, 1, not listener))
        await refuses(listener, stranger)
        # To the friend nobody has been passed off as anybody.
        assert (await proving).peer == 4

    run(check)


@both_ends
def test_the_proof_of_another_connection_does_not_serve_again(listener: bool) -> None:
    async def check() -> None:
        ours, theirs = await pair()
        heard: list[bytes] = []
        friend, wire = await pair()

        async def tap() -> None:
            for _ in range(2):
                line = await wire.reader.readline()
                heard.append(line)
                theirs.writer.write(line)

        async def back() -> None:
            for _ in range(2):
                wire.writer.write(await theirs.reader.readline())

        _, _, connection, _ = await asyncio.gather(
            tap(), back(), ours.prove(SECRET, 4, listener), friend.prove(SECRET, 1, not listener)
        )
        assert connection.peer == 1

        async def stranger(end: End) -> None:
            end.writer.write(b"".join(heard))

        await refuses(listener, stranger)

    run(check)


@both_ends
@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="no JSON"),
        pytest.param(b"\xff\xfe\x00\n", id="no text"),
        pytest.param(b"[1, 2]\n", id="no object"),
        pytest.param(b"null\n", id="null"),
        pytest.param(b"{}\n", id="no rank"),
        pytest.param(b'{"rank": 1}\n{"proof": "0"}\n', id="no nonce"),
        pytest.param(b'{"nonce": "0", "rank": "x"}\n', id="no number"),
        pytest.param(b'{"nonce": "0", "rank": null}\n', id="no rank's type"),
        pytest.param(b'{"nonce": "\\ud800", "rank": 1}\n{"proof": "0"}\n', id="no characters"),
        pytest.param(b'{"nonce": "0", "rank": 1}\n', id="no proof"),
        pytest.param(b'{"nonce": "0", "rank": 1}\n{"proof": "\xc3\xbc"}\n', id="no hex"),
        pytest.param(b'{"nonce": "0", "rank": 1}\n{"proof": null}\n', id="null proof"),
        pytest.param(b"x" * (1 << 17), id="no end of line"),
        pytest.param(b'{"nonce": "0", "rank": Infinity}\n', id="infinite rank"),
        pytest.param(b"[" * 50_000 + b"\n", id="deep"),
    ],
)
def test_one_that_speaks_another_language_is_refused(listener: bool, said: bytes) -> None:
    async def stranger(end: End) -> None:
        end.writer.write(said)
        end.writer.write_eof()

    run(lambda: refuses(listener, stranger))


@both_ends
def test_one_that_says_nothing_is_refused_after_a_while(
    listener: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_HANDSHAKE_TIME", 0.05)

    async def stranger(end: End) -> None:
        await end.reader.readline()

    run(lambda: refuses(listener, stranger), seconds=3)


def test_a_peer_killed_in_the_middle_of_a_message_has_closed_the_connection() -> None:
    async def check() -> None:
        ours, theirs = await pair()
        here, _ = await asyncio.gather(ours.prove(SECRET, 0, True), theirs.prove(SECRET, 1, False))
        theirs.writer.write(b'{"fact": "dea')
        theirs.writer.close()
        assert await here.receive() is None

    run(check)


def test_a_peer_whose_connection_is_reset_has_closed_it() -> None:
    async def check() -> None:
        async with listening("tcp", SECRET) as (address, port, callers):
            reader, writer = await asyncio.open_connection(address, port)
            await authenticate(reader, writer, SECRET, 1, listener=False)
            here = await callers.get()
            sock = writer.get_extra_info("socket")
            # No lingering: what a process leaves that dies with something unread.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            receiving = asyncio.ensure_future(here.receive())
            await asyncio.sleep(0)
            writer.transport.abort()
            assert await receiving is None

    run(check)
