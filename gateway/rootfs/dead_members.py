"""Cut what connects this host's Incus to another member of its cluster that has died.

A server that loses its power sends no FIN. Incus waits on such connections until the kernel gives them up
after 30 seconds (TCP_USER_TIMEOUT), and if that server led the cluster, every request waits with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from gateway.errors import NotFound
from gateway.rootfs import sock_diag
from gateway.rootfs.sock_diag import CLOSE_WAIT, ESTABLISHED, SYN_SENT

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
    for one in sock_diag.listed(ip_network(ip_address(host)), _STATES):
        if one.remote[1] == port or one.local[1] in own:
            ended += sock_diag.destroyed(one.family, one.key)
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
