"""Find out from the kernel's TCP tables which sites have, or recently had, visitors.

This covers short requests as well as websockets that last for days, works with any Caddy, and costs visitors
nothing: the side that closes a connection first keeps it in TIME_WAIT for a minute, and the table shows how
much of that is left (proc_net_tcp.rst). Only a reset connection leaves no trace.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from gateway.rootfs import connections
from gateway.runtime import probe

_LISTEN: Final = 0x0A
_CLOSE_WAIT: Final = 0x08  # the visitor has left, but the site has not closed its side
_END: Final = len("0100007F:1F90")
_TIME_WAIT: Final = 3  # the kind of the timer
_LENGTH: Final = 60.0  # seconds of that timer: TCP_TIMEWAIT_LEN
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_ON_THE_WAY: Final = 0.3  # seconds for a request whose route was looked up to become a connection
_DRAIN: Final = 10.0  # seconds for visitors to get their answers
_LOOK: Final = 0.02
_BYTES: Final = 1 << 20  # of a tenant's table, whose length the tenant controls: 7 000 connections
_HOST_BYTES: Final = 64 << 20  # of the host's table, which has all visitors


@dataclass(frozen=True, slots=True)
class TenantPort:
    """Where a site's connections are visible: its port, its address, and the init pid of its network."""

    port: int
    address: str | None = None
    pid: int | None = None


def visited(places: Mapping[str, TenantPort]) -> dict[str, float]:
    """Return how many seconds ago each site's last connection ended, 0 while one is open; others are omitted.

    Our own probes do not count. A tenant with too many connections to read counts as in use.
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


async def drained(address: str, port: int) -> bool:
    """Wait until no visitor waits for a site that gets no new ones; return False if some still do.

    An idle connection, such as Caddy keeps, is not waiting; an idle websocket looks the same.
    """
    end, until = (socket.inet_aton(address), port), time.monotonic() + _DRAIN
    quiet_since = time.monotonic()
    while (now := time.monotonic()) < until:
        try:
            found = await asyncio.to_thread(connections.waiting, f"{address}/32", 0.0)
        except OSError:  # the kernel cannot be asked
            found = []
        own = probe.own_ports()
        if any(one.remote == end and one.local[1] not in own for one in found):
            quiet_since = now
        elif now - quiet_since >= _ON_THE_WAY:
            return True
        await asyncio.sleep(_LOOK)  # there is no event for it
    return False


def _connections(
    process: str, limit: int, wanted: Callable[[bytes], bool]
) -> Iterator[tuple[bytes, bytes, float]]:
    """Yield the two ends of each connection with a wanted end, and how many seconds ago it ended.

    Raises `OverflowError` if a table exceeds `limit` bytes. An unwanted connection costs half a microsecond.
    """
    for family in ("tcp", "tcp6"):
        try:
            table = (Path("/proc") / process / "net" / family).open("rb")
        except OSError:
            continue  # the process has just ended
        with table:
            size = len(table.readline())
            for line in table:
                size += len(line)
                if size > limit:
                    raise OverflowError
                words = line.split(None, 6)
                # of an IPv6 address the last four bytes, which is all of an IPv4-mapped one
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
    """Return an end in the table's format: an IPv4 address is a number in native byte order."""
    return b"%08X:%04X" % (int.from_bytes(socket.inet_aton(address), "little"), port)
