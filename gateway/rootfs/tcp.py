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

from gateway.rootfs import sock_diag
from gateway.rootfs.sock_diag import ESTABLISHED, End

_OLD: Final = 60.0  # seconds; a longer wait is an idle websocket, or was examined before
_TABLE: Final = 1 << 20  # bytes of a container's table: 7 000 connections

# parts of a `struct tcp_info`: ms since data was last sent and last received, and the bytes received
_SINCE: Final = struct.Struct("=44xI4xI72xQ")


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
    into = ipaddress.IPv4Network(network, strict=False)
    told = map(_connection, sock_diag.listed(into, {ESTABLISHED}, info=True))
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
    return sum(sock_diag.destroyed(socket.AF_INET, one.key) for one in found if one.local[1] not in leave)


def _connection(listed: sock_diag.Listed) -> Connection | None:
    """Parse a connection, None if it is not waiting for an answer."""
    info = listed.extension(sock_diag.INFO)
    if info is None or len(info) < _SINCE.size:
        return None
    sent, received, size = _SINCE.unpack_from(info)
    # if nothing was received yet, the second is the connection's age; else both may be of one millisecond
    if sent > received or (sent == received and size):
        return None
    return Connection(listed.local, listed.remote, sent / 1000, listed.key)


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
