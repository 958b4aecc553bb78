"""This host's TCP connections, as the kernel lists and closes them: sock_diag(7).

A container that hangs does not read what was sent to it: the kernel has accepted the data, so the sender sees
no error. sock_diag(7) finds the sender's end, the container's own table (proc(5)) the other. The tenant
controls the length of that table, so it is read only up to a limit.

A member of an Incus cluster that loses its power sends no FIN. Incus waits on such connections until the
kernel gives them up after 30 seconds (TCP_USER_TIMEOUT), and if that server led the cluster, every request
waits with it.

Listing needs no root; closing needs CAP_NET_ADMIN, and a kernel with CONFIG_INET_DIAG_DESTROY.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Final

from gateway.errors import NotFound
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
_DIAG_FILTER, _REMOTE_IS, _ANY_PORT = 1, 8, -1
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
    wanted += bytes(_SOCKET.size) + netlink.ATTRIBUTE.pack(4 + len(condition), _DIAG_FILTER) + condition
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


_OLD: Final = 60.0  # seconds; a longer wait is an idle websocket, or was examined before
_TABLE: Final = 1 << 20  # bytes of a container's table: 7 000 connections

# parts of a `struct tcp_info`: ms since data was last sent and last received, and the bytes received
_SINCE: Final = struct.Struct("=44xI4xI72xQ")


@dataclass(frozen=True, slots=True)
class TcpConnection:
    """A connection that has waited for an answer for some `seconds`. `key` identifies it to the kernel."""

    local: End
    remote: End
    seconds: float
    key: bytes


def waiting(network: str, seconds: float) -> list[TcpConnection]:
    """Return this host's connections into a network that have waited for an answer for at least `seconds`.

    Omits those that have waited for more than a minute. Raises `OSError`.
    """
    into = ipaddress.IPv4Network(network, strict=False)
    told = map(_connection, listed(into, {ESTABLISHED}, info=True))
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
        if int(words[3], 16) == ESTABLISHED:
            found.add(_end(words[2]))
    return found


def break_off(pid: int, address: str, port: int, leave: Collection[int]) -> int:
    """Close this host's connections to a container's port that it does not read; return how many.

    Keeps those from the local ports `leave`. Needs root; raises `OSError`.
    """
    end = (socket.inet_aton(address), port)
    lost = unread(pid, end)
    found = [one for one in waiting(f"{address}/32", 0.0) if one.remote == end and one.local in lost]
    return sum(destroyed(socket.AF_INET, one.key) for one in found if one.local[1] not in leave)


def _connection(listed: Listed) -> TcpConnection | None:
    """Parse a connection, None if it is not waiting for an answer."""
    info = listed.extension(INFO)
    if info is None or len(info) < _SINCE.size:
        return None
    sent, received, size = _SINCE.unpack_from(info)
    # if nothing was received yet, the second is the connection's age; else both may be of one millisecond
    if sent > received or (sent == received and size):
        return None
    return TcpConnection(listed.local, listed.remote, sent / 1000, listed.key)


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


_BUSY: Final = 1.0  # seconds that incusd may be writing
_STATES: Final = (ESTABLISHED, SYN_SENT, CLOSE_WAIT)


def members(folder: Path) -> frozenset[str]:
    """Return HOST:PORT of each member's Incus, as the incusd of a folder knows them; none without a cluster.

    They are read where incusd keeps them for a start without the others, since it answers no question while
    the leader is away. Raises `OSError`.
    """
    import sqlite3  # here, as the processes that import this module do without it

    database = folder / "database" / "local.db"
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=_BUSY)
        ) as found:
            return frozenset(str(address) for (address,) in found.execute("SELECT address FROM raft_nodes"))
    except sqlite3.Error as error:
        raise OSError(f"the members in Incus's local database cannot be read: {error}") from error


def cut_off(member: str, among: Collection[str]) -> int:
    """Close this host's connections with the Incus at HOST:PORT; return how many. Needs root.

    Other connections to that server stay. Raises `NotFound` unless it is `among` the members, and `OSError`.
    """
    host, port = _parsed(member)
    if member not in among or not _is_address(host):
        raise NotFound("no member of the cluster has this address")
    own = {_parsed(other)[1] for other in among}  # ports at which members, and so we, are asked
    ended = 0
    for one in listed(ip_network(ip_address(host)), _STATES):
        if one.remote[1] == port or one.local[1] in own:
            ended += destroyed(one.family, one.key)
    return ended


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _parsed(member: str) -> tuple[str, int]:
    host, _, port = member.rpartition(":")
    return host.strip("[]"), int(port)
