"""Where the Caddys of other members answer for the sites of their tenants.

The routes to the sites that other members of the cluster serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from gateway.caddy import Caddy, elsewhere
from gateway.errors import Unavailable
from gateway.incus.members import Member
from gateway.ownership.domains import Domains

log = logging.getLogger(__name__)

_KEPT: Final = 10.0  # seconds until the members are read again
_CONNECT: Final = 1.0  # seconds that a Caddy has to take a connection


class RemoteSites:
    """The addresses of the members' Caddys, as they were last known. `port` is the same on all members.

    `alive` says whether a member's gateway is there. A site is served without it, so that of a member whose
    gateway is not, its Caddy is asked for a connection.
    """

    def __init__(
        self,
        own: str,
        members: Callable[[], Awaitable[Sequence[Member]]],
        port: int,
        alive: Callable[[str], bool],
    ) -> None:
        self._own, self._members, self._port, self._alive = own, members, port, alive
        self._addresses: Mapping[str, str] = {}
        self._away: frozenset[str] = frozenset()
        self._read = -math.inf  # when the members were read, by the monotonic clock

    async def look(self) -> None:
        """Look up the members' addresses; the last known ones stay if the cluster does not answer."""
        if time.monotonic() - self._read >= _KEPT:
            try:
                members = await self._members()
            except Unavailable as error:
                log.info("cannot look up where other members serve sites: %s", error.message)
            else:
                self._addresses = {one.name: self._address(one.host) for one in members if one.host}
                self._read = time.monotonic()
        silent = [name for name in self._addresses if not self._alive(name)]
        answers = await asyncio.gather(*(_answers(self._addresses[name]) for name in silent))
        away = {name for name, answered in zip(silent, answers, strict=True) if not answered}
        for name in away - self._away:
            log.warning("cannot serve the sites of %s: its Caddy does not answer", name)
        self._away = frozenset(away)

    def address(self, member: str) -> str | None:
        """Return HOST:PORT of a member's Caddy, None if it is not known."""
        return self._addresses.get(member)

    def away(self, member: str) -> bool:
        """Return whether a member was not there to serve its sites at the last look, or was removed."""
        return member in self._away or (bool(self._addresses) and member not in self._addresses)

    @property
    def own(self) -> str | None:
        """HOST:PORT at which this member's Caddy answers the others, None if it is not known."""
        return self.address(self._own)

    def _address(self, host: str) -> str:
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_CONNECT):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


class MemberRoutes:
    """Where each domain of another member leads, and the page that its visitors get while that is away."""

    def __init__(self, caddy: Caddy, domains: Domains, sites: RemoteSites) -> None:
        self._caddy, self._domains, self._sites = caddy, domains, sites
        self._excused: frozenset[str] = frozenset()

    async def wanted(self) -> Mapping[str, str]:
        """Return the target of each such domain, and have Caddy excuse the sites of members that are away.

        What is not known leads where it led: without a quorum, sites of living members are served on.
        """
        await self._sites.look()
        known = self._domains.elsewhere
        routed = {domain: self._caddy.get(domain) or "" for domain in self._caddy.remote_domains()}
        if known is None:
            return routed
        wanted, away = dict[str, str](), set[str]()
        for domain, member in known.items():
            address = self._sites.address(member)
            target = routed.get(domain, "") if address is None else elsewhere(address)
            if target:
                wanted[domain] = target
            if self._sites.away(member):
                away.add(domain)
        for domain in away ^ self._excused:
            self._caddy.show_error_page(domain, domain in away)
        self._excused = frozenset(away)
        return wanted
