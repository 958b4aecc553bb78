"""Routes to the sites of other members follow whose a domain is, where that is, and whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gateway.caddy import Caddy, elsewhere
from gateway.cluster import sites
from gateway.cluster.sites import MemberRoutes, RemoteSites
from gateway.errors import Unavailable
from gateway.incus.members import NO_QUORUM, Member
from gateway.ownership.domains import Domains
from gateway.settings import Settings
from tests.live import free_ports

SHOP, BLOG = "shop.example.com", "blog.example.com"


class Cluster:
    """This member is m1; `domains` are those of the others. The gateways of those in `away` do not answer."""

    def __init__(self, caddy: Caddy) -> None:
        self.caddy, self.quorum, self.away = caddy, True, set[str]()
        (self.port,) = free_ports(1)
        self.members = {"m1": "127.0.0.1", "m2": "127.0.0.2", "m3": "fd00::3"}
        self.domains = SimpleNamespace(elsewhere=None)
        self.start()

    def start(self) -> None:
        sites = RemoteSites("m1", self._read, self.port, lambda member: member not in self.away)
        self.routes = MemberRoutes(self.caddy, cast(Domains, self.domains), sites)

    def know(self, domains: Mapping[str, str]) -> None:
        self.domains.elsewhere = domains

    async def look(self) -> dict[str, str]:
        self.caddy.reconcile(await self.routes.wanted(), ())
        return self.caddy.listed()

    async def _read(self) -> Sequence[Member]:
        if not self.quorum:
            raise Unavailable("there is none", reason=NO_QUORUM)
        return [
            Member(name, f"[{host}]:8443" if ":" in host else f"{host}:8443")
            for name, host in self.members.items()
        ]


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(sites, "_KEPT", 0.0)
    monkeypatch.setattr(sites, "_CONNECT", 30.0)  # what does not listen refuses at once
    async with Caddy(Settings(state_dir=tmp_path)) as caddy:
        yield Cluster(caddy)


def excused(cluster: Cluster) -> set[str]:
    return {path.name for path in cluster.caddy.away.iterdir()}


async def test_a_domain_leads_to_the_caddy_of_its_member_and_follows_it(cluster: Cluster) -> None:
    cluster.know({SHOP: "m2", BLOG: "m3"})
    assert await cluster.look() == {
        SHOP: elsewhere(f"127.0.0.2:{cluster.port}"),
        BLOG: elsewhere(f"[fd00::3]:{cluster.port}"),
    }
    cluster.members["m2"] = "127.0.0.9"
    cluster.know({SHOP: "m2"})
    assert await cluster.look() == {SHOP: elsewhere(f"127.0.0.9:{cluster.port}")}
    cluster.know({})
    assert await cluster.look() == {}


async def test_what_the_cluster_cannot_say_stays_as_it_was(cluster: Cluster) -> None:
    """In the next life of the gateway too, which has heard nothing yet."""
    cluster.know({SHOP: "m2"})
    before = await cluster.look()
    cluster.quorum = False
    assert await cluster.look() == before
    cluster.domains.elsewhere = None
    cluster.start()
    assert await cluster.look() == before
    cluster.know({SHOP: "m2", BLOG: "m3"})
    assert await cluster.look() == before, "where m3 is was never known"
    cluster.quorum = True
    assert (await cluster.look()).keys() == {SHOP, BLOG}


async def test_the_sites_of_a_member_that_is_away_are_excused_until_it_is_back(cluster: Cluster) -> None:
    cluster.know({SHOP: "m2", BLOG: "m3"})
    cluster.away.add("m2")
    assert (await cluster.look()).keys() == {SHOP, BLOG}, "its route is there when it is back"
    assert excused(cluster) == {SHOP}
    cluster.caddy.show_error_page("hangs.example.com", True)  # by others, for a site here
    cluster.away.clear()
    await cluster.look()
    assert excused(cluster) == {"hangs.example.com"}
    cluster.away.add("m3")
    await cluster.look()
    cluster.know({})
    await cluster.look()
    assert excused(cluster) == {"hangs.example.com"}, "nobody's domain has no excuse"


async def test_a_site_is_served_while_only_the_gateway_of_its_member_is_away(cluster: Cluster) -> None:
    """As during its upgrade: the Caddy there answers, and has all that it needs."""
    cluster.know({SHOP: "m2"})
    cluster.away.add("m2")
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.2", cluster.port)
    async with server:
        assert (await cluster.look()).keys() == {SHOP}
        assert excused(cluster) == set()
    await cluster.look()
    assert excused(cluster) == {SHOP}
