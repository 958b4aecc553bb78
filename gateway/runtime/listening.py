"""Find out where processes listen, from the kernel's TCP tables (proc_net_tcp.rst).

Listeners come first in these tables, so a tenant with many connections does not make this slower.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from itertools import islice
from pathlib import Path
from typing import Final

from gateway.bounds import part

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
