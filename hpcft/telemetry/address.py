"""Where metrics are served."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from hpcft.errors import UsageError

#: All IPv4 interfaces of a host.
_EVERYWHERE = "0.0.0.0"


@dataclass(frozen=True)
class Address:
    """A TCP port, 0 for a free one, at an interface."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def everywhere(self) -> bool:
        """Whether it is reached through all interfaces."""
        return self.host == _EVERYWHERE

    @classmethod
    def parse(cls, option: str, text: str) -> Address:
        """``9100``, or ``127.0.0.1:9100``.

        Raises
        ------
        UsageError: it is neither.
        """
        host, _, digits = text.rpartition(":")
        if not digits.isascii() or not digits.isdecimal() or int(digits) > 65535:
            raise UsageError(
                f"{option} {text!r} is no port", "give something like 9100, or 127.0.0.1:9100"
            )
        return cls(host or _EVERYWHERE, int(digits))

    def require_free(self, option: str) -> None:
        """See that nobody listens there yet.

        Raises
        ------
        UsageError: somebody does, or it is no address of this host.
        """
        with socket.socket(socket.AF_INET) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((self.host, self.port))
                trial.listen()
            except OSError as error:
                raise UsageError(
                    f"{option} {self}: nothing can listen there: {error.strerror or error}",
                    "give another port, or 0 for a free one",
                ) from error
