"""Which network the nodes reach each other by."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915
_SIOCGIFNETMASK = 0x891B


def address_towards(host: str) -> str:
    """The address of this machine that ``host`` sees it by.

    Raises
    ------
    OSError: there is no way to ``host``.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing; it asks the routing table.
        probe.connect((host, 9))
        return str(probe.getsockname()[0])


def network_of(address: str) -> str | None:
    """The network one of this machine's addresses is in, as in ``10.1.0.0/16``; None if unknown."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            try:
                own = _ask(sock, _SIOCGIFADDR, name)
                mask = _ask(sock, _SIOCGIFNETMASK, name)
            except OSError:
                continue
            if own == address:
                return str(ipaddress.ip_network(f"{own}/{mask}", strict=False))
    return None


def _ask(sock: socket.socket, request: int, interface: str) -> str:
    answer = fcntl.ioctl(sock.fileno(), request, struct.pack("256s", interface.encode()[:15]))
    return socket.inet_ntoa(answer[20:24])
