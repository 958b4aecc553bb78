"""Find out where processes listen, from the kernel's TCP tables (proc_net_tcp.rst).

Listeners come first in these tables, so a tenant with many connections does not make this slower.

They are all in one small kernel file, however many visitors there are.

This covers short requests as well as websockets that last for days, works with any Caddy, and costs visitors
nothing: the side that closes a connection first keeps it in TIME_WAIT for a minute, and the table shows how
much of that is left (proc_net_tcp.rst). Only a reset connection leaves no trace.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address
from itertools import islice
from pathlib import Path
from typing import Final

from gateway.bounds import part
from gateway.rootfs import connections
from gateway.runtime import probe

_INTERFACES: Final = Path("/proc/net/dev")  # proc(5): two lines of titles, then one interface per line
_PACKETS: Final = 1


def packets(table: Path = _INTERFACES) -> Mapping[str, int]:
    """Return how many packets each interface has received; empty if that cannot be read."""
    try:
        lines = table.read_text().splitlines()[2:]
    except OSError:
        return {}
    counts = {}
    for line in lines:
        name, _, numbers = line.partition(":")
        counts[name.strip()] = int(numbers.split(None, _PACKETS + 1)[_PACKETS])
    return counts


_LISTENING: Final = 0x0A
_CLOSE_WAIT: Final = 0x08  # the visitor has left, but the site has not closed its side
_ADDRESS_WIDTH: Final = len("0100007F:1F90")
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
                local, remote = words[1][-_ADDRESS_WIDTH:], words[2][-_ADDRESS_WIDTH:]
                if not wanted(local) and not wanted(remote):
                    continue
                if int(words[3], 16) in (_LISTENING, _CLOSE_WAIT):
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


ANYWHERE: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not bound

_END: Final = re.compile(r"((?:[0-9A-F]{8}){1,4}):([0-9A-F]{4})")
_LISTEN: Final = "0A"
_TABLE: Final = 64 << 10  # bytes of one table: 400 listeners
_PROCESSES: Final = 4096  # most processes of this machine to look at
_OWN: Final = 200  # most processes of one tree
_SOCKETS: Final = 4096  # most descriptors of one process
_STAT: Final = 4096  # bytes of one process's stat file


@dataclass(frozen=True, slots=True, order=True)
class ListeningSocket:
    """An address and port on which a process listens."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def listener(end: str) -> ListeningSocket | None:
    """Parse a table's end such as `0100007F:1F40`; None if it is not one.

    An address consists of one or four 32-bit numbers, each in native byte order.
    """
    match = _END.fullmatch(end)
    if match is None or len(match[1]) not in (8, 32):
        return None
    words = [match[1][at : at + 8] for at in range(0, len(match[1]), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    address = ip_address(packed)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return ListeningSocket(str(address), int(match[2], 16))


def of_tree(pid: int) -> frozenset[ListeningSocket]:
    """Return where a process and its descendants listen.

    Omits what cannot be read; without /proc that is everything.
    """
    sockets = {inode for member in _tree(pid)[:_OWN] for inode in _sockets(member)}
    return frozenset(_listeners(sockets))


def _tree(root: int) -> list[int]:
    parents = dict[int, int]()
    with contextlib.suppress(OSError):
        names = (entry.name for entry in Path("/proc").iterdir())
        for name in islice(filter(str.isdecimal, names), _PROCESSES):
            with contextlib.suppress(OSError, ValueError, IndexError):
                # a name may contain anything, even brackets, but the last bracket ends it
                words = part(f"/proc/{name}/stat", _STAT).rpartition(b")")[2].split()
                parents[int(name)] = int(words[1])
    tree = [root] if root in parents else []
    for member in tree:  # grows during the loop
        tree += [child for child, parent in parents.items() if parent == member]
    return tree


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in islice(Path(f"/proc/{pid}/fd").iterdir(), _SOCKETS):
            with contextlib.suppress(OSError):
                kind, _, inode = str(entry.readlink()).partition(":")
                if kind == "socket":
                    yield inode.strip("[]")


def _listeners(sockets: Collection[str]) -> Iterator[ListeningSocket]:
    for family in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            yield from in_table(part(Path("/proc/net") / family, _TABLE).decode().splitlines(), sockets)


def of_network(process: int) -> frozenset[ListeningSocket]:
    """Return where any process listens in the network of one, by a descriptor of its folder in /proc.

    Once that process has ended nothing is found, whoever has its id by then.
    """
    found = set[ListeningSocket]()
    for family in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            table = part(f"/proc/self/fd/{process}/net/{family}", _TABLE)
            found |= set(in_table(table.decode("ascii", "replace").splitlines(), None))
    return frozenset(found)


def in_table(lines: Iterable[str], sockets: Collection[str] | None) -> Iterator[ListeningSocket]:
    """Yield the listeners of a table: those whose inodes are among `sockets`, all if that is None."""
    for line in lines:
        words = line.split()
        if len(words) > 9 and words[3] == _LISTEN and (sockets is None or words[9] in sockets):
            found = listener(words[1])
            if found is not None:
                yield found
