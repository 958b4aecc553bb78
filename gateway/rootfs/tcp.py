"""Find and close this host's TCP connections to a container that does not read what was sent.

Such a connection is a request to a hanging process: the kernel has accepted the data, so the sender sees no
error. sock_diag(7) finds the sender's end, the container's own table (proc(5)) the other. The tenant controls
the length of that table, so it is read only up to a limit.

Finding them needs no root; `break_off` does.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from gateway.rootfs import netlink

End = tuple[bytes, int]
"""An IPv4 address in network byte order, and a port."""

_OLD: Final = 60.0  # seconds; a longer wait is an idle websocket, or was examined before
_TABLE: Final = 1 << 20  # bytes of a container's table: 7 000 connections

# linux/sock_diag.h, linux/inet_diag.h
_SOCK_DIAG: Final = 4
_BY_FAMILY, _DESTROY = 20, 21
_FILTER, _INFO, _REMOTE_IS, _ANY_PORT = 1, 2, 8, -1
_ESTABLISHED: Final = 1
_REQUESTED: Final = struct.Struct("=BBBxI")
_SOCKET: Final = struct.Struct("!HH16s16s12s")  # ports, addresses, interface and cookie
_CONDITION: Final = struct.Struct("=BBHBBxxi4s")
_FOUND: Final = 72  # bytes of a `struct inet_diag_msg`, which begins with 4 other bytes and the socket
# part of a `struct tcp_info`: ms since data was last sent and last received
_SINCE: Final = struct.Struct("=44xI4xI")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection that has waited for an answer for some `seconds`. `key` identifies it to the kernel."""

    local: End
    remote: End
    seconds: float
    key: bytes


def waiting(network: str, seconds: float) -> list[Connection]:
    """Return this host's connections into a network that have waited for an answer for at least `seconds`.

    Omits those that have waited for more than a minute. Raises `OSError`.
    """
    found = ipaddress.IPv4Network(network, strict=False)
    condition = _CONDITION.pack(
        *(_REMOTE_IS, _CONDITION.size, _CONDITION.size + 4),  # a jump past the end if it does not match
        *(socket.AF_INET, found.prefixlen, _ANY_PORT, found.network_address.packed),
    )
    wanted = _REQUESTED.pack(socket.AF_INET, socket.IPPROTO_TCP, 1 << (_INFO - 1), 1 << _ESTABLISHED)
    wanted += bytes(_SOCKET.size) + netlink.ATTRIBUTE.pack(4 + len(condition), _FILTER) + condition
    told = (
        _connection(said)
        for said in netlink.asked(_SOCK_DIAG, _BY_FAMILY, netlink.REQUEST | netlink.DUMP, wanted)
    )
    return [one for one in told if one is not None and seconds <= one.seconds < _OLD]


def unread(pid: int, end: End) -> set[End]:
    """Return the peers of `end`, in the network namespace of a process, whose data has not been read yet.

    Reads only the beginning of a table that is too long.
    """
    found = set()
    for line in _lines(pid):
        words = line.split(None, 5)
        if len(words) < 5 or words[4].endswith(b":00000000") or _end(words[1]) != end:
            continue
        if int(words[3], 16) == _ESTABLISHED:
            found.add(_end(words[2]))
    return found


def break_off(pid: int, address: str, port: int, leave: Collection[int]) -> int:
    """Close this host's connections to a container's port that it does not read; return how many.

    Keeps those from the local ports `leave`. Needs root; raises `OSError`.
    """
    end = (socket.inet_aton(address), port)
    lost = unread(pid, end)
    found = [one for one in waiting(f"{address}/32", 0.0) if one.remote == end and one.local in lost]
    return sum(_broken(one) for one in found if one.local[1] not in leave)


def _broken(one: Connection) -> bool:
    wanted = _REQUESTED.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 1 << _ESTABLISHED) + one.key
    try:
        for _ in netlink.asked(_SOCK_DIAG, _DESTROY, netlink.REQUEST | netlink.ACK, wanted):
            pass
    except FileNotFoundError:  # it has just closed
        return False
    return True


def _connection(said: memoryview) -> Connection | None:
    """Parse a connection, None if it is not waiting for an answer."""
    key = bytes(said[4 : 4 + _SOCKET.size])
    from_, to, here, there, _ = _SOCKET.unpack(key)
    at = _FOUND
    while at + netlink.ATTRIBUTE.size <= len(said):
        length, kind = netlink.ATTRIBUTE.unpack_from(said, at)
        if kind == _INFO and length >= netlink.ATTRIBUTE.size + _SINCE.size:
            sent, received = _SINCE.unpack_from(said, at + netlink.ATTRIBUTE.size)
            # if nothing was received yet, the second is the connection's age
            if sent > received:
                return None
            return Connection((here[:4], from_), (there[:4], to), sent / 1000, key)
        at += max((length + 3) & ~3, netlink.ATTRIBUTE.size)
    return None


def _lines(pid: int) -> Iterable[bytes]:
    for family in ("tcp", "tcp6"):  # servers listening on both show IPv4 addresses as IPv6
        try:
            with open(f"/proc/{pid}/net/{family}", "rb") as table:
                yield from table.read(_TABLE).splitlines()[1:]
        except OSError:
            continue  # the process has just ended


def _end(written: bytes) -> End:
    address, _, port = written.rpartition(b":")
    return int(address[-8:], 16).to_bytes(4, sys.byteorder), int(port, 16)
