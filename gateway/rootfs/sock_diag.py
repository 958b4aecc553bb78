"""This host's TCP connections, as the kernel lists and closes them: sock_diag(7).

Listing needs no root; `destroyed` needs CAP_NET_ADMIN, and a kernel with CONFIG_INET_DIAG_DESTROY.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from gateway.rootfs import netlink

End = tuple[bytes, int]
"""An address in network byte order, and a port."""

# linux/tcp_states.h: a connection, one that is being opened, and one that the other end has closed
ESTABLISHED, SYN_SENT, CLOSE_WAIT = 1, 2, 8
INFO: Final = 2
"""The extension with a `struct tcp_info`."""

# linux/sock_diag.h, linux/inet_diag.h
_PROTOCOL: Final = 4
_BY_FAMILY, _DESTROY = 20, 21
_FILTER, _REMOTE_IS, _ANY_PORT = 1, 8, -1
_REQUESTED: Final = struct.Struct("=BBBxI")
_SOCKET: Final = struct.Struct("!HH16s16s12s")  # ports, addresses, interface and cookie
_CONDITION: Final = struct.Struct("=BBHBBxxi")
_FOUND: Final = 72  # bytes of a `struct inet_diag_msg`, which begins with 4 other bytes and the socket
_BYTES: Final = {socket.AF_INET: 4, socket.AF_INET6: 16}  # of an address


@dataclass(frozen=True, slots=True)
class Listed:
    """A connection; `key` identifies it to the kernel, `more` are the extensions that were asked for."""

    family: int
    local: End
    remote: End
    key: bytes
    more: memoryview

    def extension(self, wanted: int) -> memoryview | None:
        """Return the content of an extension, None if there is none."""
        at = 0
        while at + netlink.ATTRIBUTE.size <= len(self.more):
            length, kind = netlink.ATTRIBUTE.unpack_from(self.more, at)
            if kind == wanted and length >= netlink.ATTRIBUTE.size:
                return self.more[at + netlink.ATTRIBUTE.size : at + length]
            at += max((length + 3) & ~3, netlink.ATTRIBUTE.size)
        return None


def listed(
    into: IPv4Network | IPv6Network, states: Collection[int], *, info: bool = False
) -> Iterator[Listed]:
    """Yield this host's connections into a network, with `INFO` if `info`. Raises `OSError`."""
    family = socket.AF_INET if into.version == 4 else socket.AF_INET6
    address = into.network_address.packed
    size = _CONDITION.size + len(address)
    # a jump past the end if it does not match
    condition = _CONDITION.pack(_REMOTE_IS, size, size + 4, family, into.prefixlen, _ANY_PORT) + address
    wanted = _REQUESTED.pack(
        family, socket.IPPROTO_TCP, info << (INFO - 1), sum(1 << state for state in states)
    )
    wanted += bytes(_SOCKET.size) + netlink.ATTRIBUTE.pack(4 + len(condition), _FILTER) + condition
    for said in netlink.asked(_PROTOCOL, _BY_FAMILY, netlink.REQUEST | netlink.DUMP, wanted):
        key = bytes(said[4 : 4 + _SOCKET.size])
        from_, to, here, there, _ = _SOCKET.unpack(key)
        length = _BYTES[family]
        yield Listed(family, (here[:length], from_), (there[:length], to), key, said[_FOUND:])


def destroyed(family: int, key: bytes) -> bool:
    """Close a connection: both its ends fail at their next use; return whether it was still there.

    Raises `OSError`; EOPNOTSUPP is a kernel that cannot do that.
    """
    wanted = _REQUESTED.pack(family, socket.IPPROTO_TCP, 0, (1 << 12) - 1) + key
    try:
        for _ in netlink.asked(_PROTOCOL, _DESTROY, netlink.REQUEST | netlink.ACK, wanted):
            pass
    except FileNotFoundError:  # it has just closed
        return False
    return True


def can_destroy() -> bool:
    """Return whether the kernel can close connections. Raises `OSError` where it cannot be asked."""
    try:
        destroyed(socket.AF_INET, bytes(_SOCKET.size))  # none has such a key
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return False
        raise
    return True
