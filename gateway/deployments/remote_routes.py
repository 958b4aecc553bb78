"""The routes to the sites that other members of the cluster serve."""

from __future__ import annotations

from collections.abc import Mapping

from gateway.caddy import Caddy, elsewhere
from gateway.cluster.remote_sites import RemoteSites
from gateway.ownership.domains import Domains


class RemoteRoutes:
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
