"""A connection of the mesh (:mod:`hpcft.train.mesh`): what goes over it, byte by byte."""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

_HEADER = struct.Struct("=BqqQ")
#: Seconds a peer may take to say who it is.
PATIENCE = 5.0


class Kind(enum.IntEnum):
    """What a message is."""

    HELLO = 0
    BEGUN = enum.auto()
    UPDATE = enum.auto()
    DONE = enum.auto()
    ASK = enum.auto()
    STATE = enum.auto()


class Line:
    """This end of one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._header = bytearray(_HEADER.size)

    def greet(self, key: bytes, dialled: bool, number: int) -> int:
        """Get to know who is at the other end, which must not take long.

        Parameters
        ----------
        key: both ends prove that they know it.
        number: says who this is.

        Returns
        -------
        The other's number.

        Raises
        ------
        OSError, EOFError: it is not of this run, or does not answer.
        """
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._limit(PATIENCE)
        self._prove(key, dialled)
        return self._swap(number)

    def settle(self, number: int) -> int:
        """And where both are; from then on the other may take its time. Returns its number."""
        theirs = self._swap(number)
        self._limit(0)
        return theirs

    def _swap(self, number: int) -> int:
        self.send(Kind.HELLO, number)
        _, theirs, _, _ = self.receive()
        return theirs

    def _prove(self, key: bytes, dialled: bool) -> None:
        connection = Connection(os.dup(self._sock.fileno()))
        steps = [deliver_challenge, answer_challenge]
        try:
            for step in reversed(steps) if dialled else steps:
                step(connection, key)
        except Exception as error:
            raise OSError("a stranger") from error
        finally:
            connection.close()

    def _limit(self, seconds: float) -> None:
        """Have calls fail after so long; 0: never. The socket stays one that blocks."""
        limit = struct.pack("ll", int(seconds), 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, kind: Kind, first: int = 0, second: int = 0, body: Any = b"") -> None:
        """Send a message with two numbers, and bytes."""
        view = memoryview(body).cast("B")
        self._sock.sendall(_HEADER.pack(kind, first, second, view.nbytes))
        self.send_raw(view)

    def send_raw(self, body: Any) -> None:
        """Send bytes that belong to the message before."""
        self._sock.sendall(body)

    def receive(self) -> tuple[int, int, int, int]:
        """What kind of message is next, its numbers, and the length of its body, which follows."""
        kind, first, second, length = _HEADER.unpack(self.fill(self._header))
        return kind, first, second, length

    def fill(self, into: Any) -> Any:
        """Receive into ``into`` as much as it holds, and return it.

        Raises
        ------
        EOFError: the other end is closed.
        """
        left = memoryview(into)
        while left.nbytes:
            count = self._sock.recv_into(left)
            if not count:
                raise EOFError
            left = left[count:]
        return into

    def shut(self) -> None:
        """Have both ends' calls end."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """It is not used any more."""
        self._sock.close()
