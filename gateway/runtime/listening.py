"""Read where processes listen, from the kernel's tables of TCP sockets (proc_net_tcp.rst).

Listeners come first in these tables, so that a tenant with any number of connections makes nothing longer.
"""

from __future__ import annotations

import contextlib
import os
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
_PROCESSES: Final = 4096  # of this machine that are looked at
_OWN: Final = 200  # of these, of one tree
_SOCKETS: Final = 4096  # descriptors of one process
_STAT: Final = 4096  # bytes of what the kernel says of one process
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """An address and a port that take connections."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def listener(end: str) -> Listener | None:
    """Return an end as a table writes it, `0100007F:1F40`; None for anything else.

    An address is one or four numbers of 32 bits, each in this machine's own order of bytes.
    """
    match = _END.fullmatch(end)
    if match is None or len(match[1]) not in (8, 32):
        return None
    words = [match[1][at : at + 8] for at in range(0, len(match[1]), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    address = ip_address(packed)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return Listener(str(address), int(match[2], 16))


def of_tree(pid: int) -> tuple[frozenset[Listener], float]:
    """Return where a process of this machine and those below it listen, and the CPU seconds of all.

    Leaves out what cannot be read, which is everything without /proc.
    """
    tree, cpu = _tree(pid)
    sockets = {inode for member in tree[:_OWN] for inode in _sockets(member)}
    return frozenset(_listeners(sockets)), cpu


def _tree(root: int) -> tuple[list[int], float]:
    parents, spent = dict[int, int](), dict[int, float]()
    with contextlib.suppress(OSError):
        names = (entry.name for entry in Path("/proc").iterdir())
        for name in islice(filter(str.isdecimal, names), _PROCESSES):
            with contextlib.suppress(OSError, ValueError, IndexError):
                # a name may hold anything, brackets too, but nothing behind the last of these
                words = part(f"/proc/{name}/stat", _STAT).rpartition(b")")[2].split()
                parents[int(name)] = int(words[1])
                spent[int(name)] = (int(words[11]) + int(words[12])) / _TICKS
    tree = [root] if root in parents else []
    for member in tree:  # grows on the way
        tree += [child for child, parent in parents.items() if parent == member]
    return tree, sum(spent[member] for member in tree)


def _sockets(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for entry in islice(Path(f"/proc/{pid}/fd").iterdir(), _SOCKETS):
            with contextlib.suppress(OSError):
                kind, _, inode = str(entry.readlink()).partition(":")
                if kind == "socket":
                    yield inode.strip("[]")


def _listeners(sockets: Collection[str]) -> Iterator[Listener]:
    for family in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            yield from in_table(part(Path("/proc/net") / family, _TABLE).decode().splitlines(), sockets)


def in_table(lines: Iterable[str], sockets: Collection[str]) -> Iterator[Listener]:
    """Yield the listeners of a table that are among these sockets, by their inodes."""
    for line in lines:
        words = line.split()
        if len(words) > 9 and words[3] == _LISTEN and words[9] in sockets:
            found = listener(words[1])
            if found is not None:
                yield found
