"""Ends the wait for a member whose server has died, so that the cluster chooses another leader at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Final

from gateway.cluster.peers import Peer, Peers
from gateway.errors import GatewayError

log = logging.getLogger(__name__)

# seconds in which the kernel of a server that lives answers, however busy that is; a packet that is lost is
# sent again after one
_ANSWERING: Final = 1.2
_SYN_SENT: Final = 2  # linux/tcp_states.h
_LOOK: Final = 0.1  # seconds between two looks whether it has
_PAUSES: Final = (0.25, 10.0)  # seconds between two looks: while others elect a leader, and later
_ELECTING: Final = 30.0  # seconds; the kernel gives the connections up by itself after as many

CutOff = Callable[[str], Awaitable[int]]
"""Closes this host's connections with the Incus at HOST:PORT; returns how many."""


class DeadPeers:
    """Checks the servers of silent peers, and has the connections to dead ones cut.

    A silent gateway may just be down, on a server that lives. So the server is asked for a connection: one
    that refuses it is alive, and only one that answers nothing at all counts as dead.
    """

    def __init__(self, peers: Peers, cut_off: CutOff) -> None:
        self._peers, self._cut_off = peers, cut_off
        self._silent = asyncio.Event()
        self._told: set[str] = set()  # dead members of which the log has said so

    async def follow(self) -> None:
        """Check the servers whenever a peer falls silent. Runs forever."""
        self._peers.silent = self._silent.set
        self._silent.set()  # by those that died before
        while True:
            await self._silent.wait()
            self._silent.clear()
            await self._look_on()

    async def _look_on(self) -> None:
        """Check until all peers are reachable again."""
        loop = asyncio.get_running_loop()
        eager = loop.time() + _ELECTING
        while silent := [peer for peer in self._peers.all.values() if not peer.alive and peer.incus]:
            await asyncio.gather(*map(self._look, silent))
            pause, rare = _PAUSES
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause if loop.time() < eager else rare):
                    await self._silent.wait()
                    eager = loop.time() + _ELECTING  # another one
            self._silent.clear()
            self._told &= {peer.name for peer in silent}

    async def _look(self, peer: Peer) -> None:
        if await answers(peer.incus):
            self._told.discard(peer.name)
            return
        try:
            ended = await self._cut_off(peer.incus)
        except GatewayError as error:
            log.warning("cannot close Incus's connections to %s, which is dead: %s", peer.name, error.message)
        else:
            # Incus calls it again and again
            log.log(
                logging.DEBUG if peer.name in self._told else logging.WARNING,
                *("%s is dead: closed %d connections of Incus to it", peer.name, ended),
            )
            self._told.add(peer.name)


async def answers(address: str) -> bool:
    """Return whether a server answers a connection attempt at all, even by refusing it.

    The kernel is asked for that, and only after the time: this process may have no CPU meanwhile.
    """
    host, _, port = address.rpartition(":")
    try:
        place = ip_address(host.strip("[]"))
    except ValueError:
        return True  # a name, which nobody here may wait for
    family = socket.AF_INET if place.version == 4 else socket.AF_INET6
    loop = asyncio.get_running_loop()
    until = loop.time() + _ANSWERING
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        error = probe.connect_ex((str(place), int(port)))
        while error in (0, errno.EINPROGRESS):
            if probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _SYN_SENT:
                return True
            if loop.time() > until:
                return False
            await asyncio.sleep(_LOOK)
            error = probe.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return error == errno.ECONNREFUSED
