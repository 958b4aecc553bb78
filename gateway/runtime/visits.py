"""Finds in the kernel's tables of TCP connections which sites have, or had lately, visitors.

That shows short requests as well as websockets that last for days, whichever Caddy serves them, and costs the
visitors nothing: the end that closes a connection first keeps its trace for a minute (TIME_WAIT), and the
table says how much of that is left (proc_net_tcp.rst). Only a connection that was reset leaves no trace.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from gateway.runtime import probe

_LISTEN: Final = 0x0A
_CLOSE_WAIT: Final = 0x08  # the visitor has gone: only the site has not noticed
_END: Final = len("0100007F:1F90")
_TIME_WAIT: Final = 3  # the kind of the timer
_LENGTH: Final = 60.0  # seconds that it runs: TCP_TIMEWAIT_LEN
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_BYTES: Final = 1 << 20  # of one table of a tenant, which is as long as the tenant wants: 7 000 connections
_HOST_BYTES: Final = 64 << 20  # of this machine's own, in which are those of all visitors


@dataclass(frozen=True, slots=True)
class Place:
    """Where a site's connections are seen: the first process of its network, if it has one, and its end."""

    port: int
    address: str | None = None
    pid: int | None = None


def visited(places: Mapping[str, Place]) -> dict[str, float]:
    """Return how many seconds ago each one's last connection ended: 0 while there is one, absent without.

    Our own probes do not count. A tenant with more connections than can be read counts as in use.
    """
    ends = {name: _end(place.address, place.port) for name, place in places.items() if place.address}
    wanted = frozenset(ends.values())
    host: dict[bytes, float] = {}
    try:
        for local, remote, age in _connections("self", _HOST_BYTES, lambda end: end in wanted):
            for end in (local, remote):
                host[end] = min(age, host.get(end, age))
    except OverflowError:
        host = dict.fromkeys(wanted, 0.0)
    found = {}
    for name, place in places.items():
        ages = []
        if name in ends:
            ages.append(host.get(ends[name]))
        if place.pid is not None:
            port = b":%04X" % place.port
            try:
                own = _connections(str(place.pid), _BYTES, partial(_is_at, port))
                ages += [age for local, _, age in own if local.endswith(port)]
            except OverflowError:
                ages.append(0.0)
        if known := [age for age in ages if age is not None]:
            found[name] = min(known)
    return found


def _connections(
    process: str, limit: int, wanted: Callable[[bytes], bool]
) -> Iterator[tuple[bytes, bytes, float]]:
    """Yield both ends of each connection of which one is wanted, and how long ago it ended.

    Raises `OverflowError` if a table has over `limit` bytes. Each unwanted one costs half a microsecond.
    """
    for family in ("tcp", "tcp6"):
        try:
            table = (Path("/proc") / process / "net" / family).open("rb")
        except OSError:
            continue  # it has just ended
        with table:
            size = len(table.readline())
            for line in table:
                size += len(line)
                if size > limit:
                    raise OverflowError
                words = line.split(None, 6)
                # of an IPv6 address the last four bytes: those of an IPv4 one that is written as such
                local, remote = words[1][-_END:], words[2][-_END:]
                if not wanted(local) and not wanted(remote):
                    continue
                if int(words[3], 16) in (_LISTEN, _CLOSE_WAIT):
                    continue
                if probe.ours(int(local[-4:], 16)) or probe.ours(int(remote[-4:], 16)):
                    continue
                timer, _, left = words[5].partition(b":")
                waits = int(timer, 16) == _TIME_WAIT
                yield local, remote, max(0.0, _LENGTH - int(left, 16) / _TICKS) if waits else 0.0


def _is_at(port: bytes, end: bytes) -> bool:
    return end.endswith(port)


def _end(address: str, port: int) -> bytes:
    """Return one end as the table has it: an IPv4 address is the bytes of a number of this machine."""
    return b"%08X:%04X" % (int.from_bytes(socket.inet_aton(address), "little"), port)
