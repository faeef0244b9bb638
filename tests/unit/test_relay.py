"""What the relay lets pass between a rank and its PMIx server, however the bytes are cut."""

from __future__ import annotations

import asyncio
import itertools
import re
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.launch import relay
from hpcft.launch.relay import Filter, Relay

FINALIZE, FENCE, NOTIFY = 5, 3, 12
HEADER, INTRODUCTION = struct.Struct(">iIII"), struct.Struct("=iIII")
LARGEST = 1 << 28


def request(command: int, tag: int = 100, index: int = 0, rest: bytes = b"") -> bytes:
    payload = bytes((2, command)) + rest
    return HEADER.pack(index, tag, len(payload), 0) + payload


def introduction(payload: bytes = b"hello") -> bytes:
    return INTRODUCTION.pack(-1, 0, len(payload), 0) + payload


@dataclass(frozen=True)
class Said:
    """A message, and what is to become of it."""

    data: bytes
    passes: bool = True
    finalizes: bool = False


requests = st.builds(
    lambda command, tag, index, rest: Said(
        request(command, tag, index, rest), command != NOTIFY, command == FINALIZE
    ),
    st.sampled_from([FINALIZE, FENCE, NOTIFY, NOTIFY, 0, 255]),
    st.integers(1, 1 << 31),
    st.integers(-(1 << 31), (1 << 31) - 1),
    st.binary(max_size=40),
)
# What does not begin with the count of one value is no command, whatever follows.
others = st.one_of(
    st.binary(max_size=40).filter(lambda payload: payload[:1] != b"\x02"),
    st.sampled_from([bytes((1, NOTIFY)), bytes((4, NOTIFY)), bytes((1, FINALIZE)), b"\x02"]),
).map(lambda payload: Said(HEADER.pack(0, 7, len(payload), 0) + payload))
# Whatever is in the introduction, it passes, even what would be an alarm later.
introductions = st.one_of(
    st.binary(max_size=40), st.just(bytes((2, NOTIFY))), st.just(bytes((2, FINALIZE)))
).map(lambda payload: Said(introduction(payload)))
conversations = st.builds(
    lambda first, later: [first, *later],
    introductions,
    st.lists(st.one_of(requests, others), max_size=8),
)


def chunks(data: st.DataObject, whole: bytes) -> list[bytes]:
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12), "cuts")
    edges = [0, *sorted(cuts), len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(edges)]


def passed_of(said: list[Said], received: int) -> bytes:
    """What must have been passed on once ``received`` bytes have come in: whole messages only."""
    passed, end = b"", 0
    for message in said:
        end += len(message.data)
        if end <= received and message.passes:
            passed += message.data
    return passed


@given(st.data(), conversations)
def test_all_but_the_alarms_passes_at_once_however_it_is_cut(
    data: st.DataObject, said: list[Said]
) -> None:
    sieve, passed, received = Filter(), b"", 0
    for chunk in chunks(data, b"".join(message.data for message in said)):
        passed += sieve.feed(chunk)
        received += len(chunk)
        assert passed == passed_of(said, received)
    assert sieve.dropped == sum(not message.passes for message in said)
    assert sieve.finalized == any(message.finalizes for message in said)


@given(st.data(), st.lists(requests, max_size=4), st.integers(LARGEST + 1, (1 << 32) - 1))
def test_after_a_length_that_is_none_everything_passes_untouched(
    data: st.DataObject, later: list[Said], length: int
) -> None:
    said = [Said(introduction()), *later]
    garbage = HEADER.pack(0, 1, length, 0) + data.draw(st.binary(max_size=40)) + request(NOTIFY)
    sieve, passed = Filter(), b""
    for chunk in chunks(data, b"".join(message.data for message in said) + garbage):
        passed += sieve.feed(chunk)
    assert passed == passed_of(said, len(passed) + 10**6) + garbage
    assert sieve.dropped == sum(not message.passes for message in said)
    assert sieve.feed(request(NOTIFY)) == request(NOTIFY)
    assert sieve.farewell() is None


def test_the_introduction_is_measured_in_native_byte_order_and_the_rest_in_network_order() -> None:
    assert Filter().feed(INTRODUCTION.pack(0, 0, LARGEST + 1, 0)) != b""
    assert Filter().feed(INTRODUCTION.pack(0, 0, LARGEST, 0)) == b""
    sieve = Filter()
    sieve.feed(introduction())
    assert sieve.feed(HEADER.pack(0, 1, LARGEST, 0)) == b""


def test_there_is_no_leave_to_take_before_the_first_request() -> None:
    sieve = Filter()
    assert sieve.farewell() is None
    sieve.feed(introduction())
    assert sieve.farewell() is None
    sieve.feed(request(FENCE)[:-1])
    assert sieve.farewell() is None


def test_there_is_no_leave_to_take_twice() -> None:
    sieve = Filter()
    sieve.feed(introduction() + request(FENCE))
    assert sieve.farewell() is not None
    sieve.feed(request(FINALIZE))
    assert sieve.farewell() is None


@given(st.integers(-1, 1000), st.integers(1, 1 << 31), st.sampled_from([FENCE, NOTIFY]))
def test_leave_is_taken_as_the_clients_next_request(index: int, tag: int, last: int) -> None:
    sieve = Filter()
    # A request the client did not live to complete has used no tag.
    sieve.feed(introduction() + request(FENCE, 5) + request(last, tag, index))
    sieve.feed(request(FENCE, tag + 1, index)[:-1])
    farewell = sieve.farewell()
    assert farewell is not None
    assert HEADER.unpack_from(farewell) == (index, tag + 1, len(farewell) - HEADER.size, 0)
    successor = Filter()
    assert successor.feed(introduction() + farewell) == introduction() + farewell
    assert successor.finalized


class Server:
    """Stands for the PMIx server: takes one connection, and says what it is told to."""

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )

    async def start(self) -> dict[str, str]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.arrived.put((reader, writer))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        return {
            "PMIX_SERVER_URI41": f"prterun.0;tcp4://127.0.0.1:{port}",
            "PMIX_RANK": "3",
            "ELSEWHERE": f"tcp4://127.0.0.1:{port}",
        }


async def call(environ: dict[str, str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    found = re.fullmatch(r"prterun\.0;tcp4://127\.0\.0\.1:(\d+)", environ["PMIX_SERVER_URI41"])
    assert found
    return await asyncio.open_connection("127.0.0.1", int(found[1]))


async def read(reader: asyncio.StreamReader, count: int) -> bytes:
    return await asyncio.wait_for(reader.readexactly(count), 5)


def test_only_the_servers_address_is_replaced() -> None:
    async def check() -> None:
        environ = await Server().start()
        link = await Relay.start(environ)
        changed = {name for name in environ if link.environ[name] != environ[name]}
        assert changed == {"PMIX_SERVER_URI41"}
        assert link.environ.keys() == environ.keys()
        await link.close()

    asyncio.run(check())


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for an answer that does not come waits for too long."""
    monkeypatch.setattr(relay, "_PATIENCE", 60.0)


@pytest.mark.usefixtures("patient")
def test_the_server_does_not_notice_the_ranks_death_until_leave_is_taken() -> None:
    async def check() -> None:
        server = Server()
        link = await Relay.start(await server.start())
        from_relay, to_relay = await call(link.environ)
        from_rank, to_rank = await asyncio.wait_for(server.arrived.get(), 5)

        passing = introduction() + request(FENCE, 100, 3)
        to_relay.write(introduction() + request(NOTIFY, 99, 3) + request(FENCE, 100, 3))
        assert await read(from_rank, len(passing)) == passing
        to_rank.write(b"answer")
        assert await read(from_relay, 6) == b"answer"

        to_relay.close()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(from_rank.read(1), 0.15)
        # The server must not get stuck in talking to the dead either.
        to_rank.write(b"more")
        await asyncio.sleep(0.05)

        closing = asyncio.ensure_future(link.close())
        farewell = await read(from_rank, HEADER.size + 4)
        assert HEADER.unpack_from(farewell) == (3, 101, 4, 0)
        assert farewell[HEADER.size :][:2] == bytes((2, FINALIZE))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(from_rank.read(1), 0.1)
        to_rank.write(b"go")
        assert await asyncio.wait_for(from_rank.read(), 5) == b""
        await asyncio.wait_for(closing, 5)

    asyncio.run(check())


def test_a_server_that_does_not_answer_is_left_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(relay, "_PATIENCE", 0.05)

    async def check() -> None:
        server = Server()
        link = await Relay.start(await server.start())
        _, to_relay = await call(link.environ)
        from_rank, _ = await asyncio.wait_for(server.arrived.get(), 5)
        said = introduction() + request(FENCE)
        to_relay.write(said)
        assert await read(from_rank, len(said)) == said
        await asyncio.wait_for(link.close(), 5)
        assert len(await asyncio.wait_for(from_rank.read(), 5)) == HEADER.size + 4

    asyncio.run(check())


@pytest.mark.usefixtures("patient")
def test_a_rank_that_has_taken_leave_itself_is_only_disconnected() -> None:
    async def check() -> None:
        server = Server()
        link = await Relay.start(await server.start())
        _, to_relay = await call(link.environ)
        from_rank, _ = await asyncio.wait_for(server.arrived.get(), 5)
        said = introduction() + request(FINALIZE)
        to_relay.write(said)
        assert await read(from_rank, len(said)) == said
        to_relay.close()
        await asyncio.wait_for(link.close(), 5)
        assert await asyncio.wait_for(from_rank.read(), 5) == b""

    asyncio.run(check())


@pytest.mark.usefixtures("patient")
def test_the_rank_is_not_told_when_the_server_goes() -> None:
    async def check() -> None:
        server = Server()
        link = await Relay.start(await server.start())
        from_relay, to_relay = await call(link.environ)
        from_rank, to_rank = await asyncio.wait_for(server.arrived.get(), 5)
        to_relay.write(introduction() + request(FENCE))
        await read(from_rank, len(introduction() + request(FENCE)))
        to_rank.close()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(from_relay.read(), 0.2)
        # Nobody is left to answer a farewell, so none is waited for.
        await asyncio.wait_for(link.close(), 5)

    asyncio.run(check())


def test_without_a_server_to_pass_on_to_the_rank_is_hung_up_on() -> None:
    async def check() -> None:
        link = await Relay.start({"PMIX_RANK": "0"})
        assert link.environ == {"PMIX_RANK": "0"}
        assert link._listener is not None
        port = link._listener.sockets[0].getsockname()[1]
        reader, _ = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        await link.close()

    asyncio.run(check())
