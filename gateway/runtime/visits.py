"""Knows who is, or was lately, connected to a site, from the kernel's tables of TCP connections.

Requests that take a moment are seen as well as websockets that last for days, whichever Caddy serves them,
at no cost to any: whoever ends a connection first keeps its trace for a minute (TIME_WAIT), and the table
tells how much of that is left (proc_net_tcp.rst). Only a connection that was broken off by a reset leaves
none.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gateway.runtime import probe

_LISTEN: Final = 0x0A
_CLOSE_WAIT: Final = 0x08  # the visitor has gone: only the site has not noticed
_TIME_WAIT: Final = 3  # the kind of the timer
_LENGTH: Final = 60.0  # seconds that it runs: TCP_TIMEWAIT_LEN
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_BYTES: Final = 2 << 20  # of one table of a tenant, which is as long as the tenant wants


@dataclass(frozen=True, slots=True)
class Place:
    """Where a site's connections are seen: the first process of its network, if it has one, and its end."""

    port: int
    address: str | None = None
    pid: int | None = None


def visited(places: Mapping[str, Place]) -> dict[str, float]:
    """Return how many seconds ago each one's last connection ended: 0 while there is one, absent without.

    Our own probes are none. A tenant with more connections than can be looked through is in use.
    """
    host: dict[tuple[str, int], float] = {}
    for local, remote, age in _connections("self", None):
        for end in (local, remote):
            host[end] = min(age, host.get(end, age))
    found = {}
    for name, place in places.items():
        ages = []
        if place.address is not None:
            ages.append(host.get((_written(place.address), place.port)))
        if place.pid is not None:
            try:
                own = _connections(str(place.pid), _BYTES)
                ages += [age for (_, port), _, age in own if port == place.port]
            except OverflowError:
                ages.append(0.0)
        if known := [age for age in ages if age is not None]:
            found[name] = min(known)
    return found


End = tuple[str, int]


def _connections(process: str, limit: int | None) -> Iterator[tuple[End, End, float]]:
    """Yield both ends of each connection and how long ago it ended. Raises `OverflowError` over `limit`."""
    for family in ("tcp", "tcp6"):
        try:
            with (Path("/proc") / process / "net" / family).open("rb") as table:
                text = table.read(-1 if limit is None else limit + 1)
        except OSError:
            continue  # it has just ended
        if limit is not None and len(text) > limit:
            raise OverflowError
        for line in text.decode("ascii").splitlines()[1:]:
            words = line.split()
            local, remote, state = _end(words[1]), _end(words[2]), int(words[3], 16)
            if state in (_LISTEN, _CLOSE_WAIT) or probe.ours(local[1]) or probe.ours(remote[1]):
                continue
            timer, _, left = words[5].partition(":")
            waits = int(timer, 16) == _TIME_WAIT
            yield local, remote, max(0.0, _LENGTH - int(left, 16) / _TICKS) if waits else 0.0


def _end(text: str) -> End:
    # of an IPv6 address the last four bytes: those of an IPv4 one that is written as such
    address, _, port = text.partition(":")
    return address[-8:], int(port, 16)


def _written(address: str) -> str:
    """Return an IPv4 address as the table has it: the bytes of a number of this machine."""
    return f"{int.from_bytes(socket.inet_aton(address), 'little'):08X}"
