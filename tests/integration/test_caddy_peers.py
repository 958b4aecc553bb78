"""Two real Caddys, as of two members of a cluster: each serves the other's sites. Needs no Incus."""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.caddy import Caddy, asleep, elsewhere
from gateway.caddy.routes import NAME, certified
from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import RealCaddy, settings_for
from tests.live import free_ports

SHOP, TWIN, MOVED = "shop.example.com", "twin.example.com", "moved.example.com"
SECRET = "s" * 40
CLAIMED = "192.0.2.7"


class Site:
    """A server that says what it was asked, and echoes websockets."""

    def __init__(self, name: str) -> None:
        self.name, self.port = name, 0
        app = web.Application(client_max_size=10_000_000)
        app.router.add_get("/socket", self._echo)
        app.router.add_get("/v1/wake", self._wake)
        app.router.add_route("*", "/{path:.*}", self._say)
        self._runner = web.AppRunner(app)
        self.woken = list[str]()

    async def start(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _say(self, request: web.Request) -> web.Response:
        told = {key: request.headers.get(key, "") for key in ("X-Forwarded-For", "X-Forwarded-Proto")}
        body = len(await request.read())
        return web.json_response({"site": self.name, "host": request.host, "body": body, **told})

    async def _wake(self, request: web.Request) -> web.Response:
        self.woken.append(request.query["domain"])
        return web.Response()

    async def _echo(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(f"{self.name} {message.data}")
        return socket


@dataclass
class Member:
    """A member's Caddy, its routes, and a server that is a tenant's site and the gateway at once."""

    caddy: RealCaddy
    routes: Caddy
    site: Site
    address: str

    async def ask(self, domain: str, body: bytes = b"") -> tuple[int, dict[str, Any]]:
        """Return status and answer to a visitor that came by HTTPS."""
        async with (
            aiohttp.ClientSession() as session,
            session.request(
                "POST" if body else "GET",
                f"https://127.0.0.1:{self.caddy.settings.caddy_https}/",
                data=io.BytesIO(body),
                headers={"Host": domain, "Accept": "application/json", "X-Forwarded-For": CLAIMED},
                server_hostname=domain,
                ssl=False,
            ) as answer,
        ):
            found = await answer.json(content_type=None)
            return answer.status, {**found, "retry": answer.headers.get("Retry-After", "")}


async def member(name: str, folder: Path) -> Member:
    site = Site(name)
    await site.start()
    settings = settings_for(environment.settings(), folder).model_copy(
        update={"listen": f"127.0.0.1:{site.port}", "caddy_issuer": "internal"}
    )
    caddy, routes = RealCaddy(settings), Caddy(settings)
    await routes.__aenter__()
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    routes.join(address, SECRET)
    return Member(caddy, routes, site, address)


@pytest.fixture(scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Member, Member]]:
    m1 = await member("m1", tmp_path_factory.mktemp("m1"))
    m2 = await member("m2", tmp_path_factory.mktemp("m2"))
    m2.routes.set(SHOP, f"127.0.0.1:{m2.site.port}")
    m1.routes.set(SHOP, elsewhere(m2.address))
    # the same address on both members, as bridges have it
    m1.routes.set(TWIN, f"127.0.0.1:{m1.site.port}")
    m2.routes.set(TWIN, elsewhere(m1.address))
    m1.routes.set(MOVED, elsewhere(m2.address))
    m2.routes.set(MOVED, elsewhere(m1.address))
    for one in (m1, m2):
        await one.caddy.start()
    yield m1, m2
    for one in (m1, m2):
        await one.caddy.stop()
        await one.routes.__aexit__(None, None, None)
        await one.site.stop()


async def test_each_caddy_serves_each_domain_by_its_own_site(members: tuple[Member, Member]) -> None:
    for one in members:
        for domain, site in ((SHOP, "m2"), (TWIN, "m1")):
            status, said = await one.ask(domain)
            assert (status, said["site"], said["host"]) == (200, site, domain)


async def test_the_site_hears_of_the_visitor_and_not_of_the_peer(members: tuple[Member, Member]) -> None:
    _, said = await members[0].ask(SHOP)
    assert said["X-Forwarded-For"] == "127.0.0.1, 127.0.0.1", "visitor and entrance; not what one claims"
    assert said["X-Forwarded-Proto"] == "https"


async def test_bodies_and_websockets_pass(members: tuple[Member, Member]) -> None:
    status, said = await members[0].ask(SHOP, b"x" * 5_000_000)
    assert (status, said["body"]) == (200, 5_000_000)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(
            f"https://127.0.0.1:{members[0].caddy.settings.caddy_https}/socket",
            headers={"Host": SHOP},
            server_hostname=SHOP,
            ssl=False,
        ) as socket,
    ):
        for number in range(3):
            await socket.send_str(str(number))
            assert await socket.receive_str(timeout=10) == f"m2 {number}"


async def test_a_site_that_sleeps_is_woken_at_home(members: tuple[Member, Member]) -> None:
    m1, m2 = members
    m2.routes.set(SHOP, asleep(f"127.0.0.1:{m2.site.port}"))
    try:
        assert (await m1.ask(SHOP))[1]["site"] == "m2"
        assert (m1.site.woken, m2.site.woken) == ([], [SHOP])
    finally:
        m2.routes.set(SHOP, f"127.0.0.1:{m2.site.port}")


async def test_the_page_of_a_site_that_hangs_comes_from_home(members: tuple[Member, Member]) -> None:
    m1, m2 = members
    m2.routes.show_error_page(SHOP, True)
    try:
        status, said = await m1.ask(SHOP)
        assert (status, said["retry"]) == (503, "5")
    finally:
        m2.routes.show_error_page(SHOP, False)


async def test_the_sites_of_a_member_that_is_away_are_503_at_once(members: tuple[Member, Member]) -> None:
    m1, _ = members
    m1.routes.show_error_page(SHOP, True)
    try:
        status, said = await m1.ask(SHOP)
        assert (status, said["retry"]) == (503, "5")
    finally:
        m1.routes.show_error_page(SHOP, False)


async def test_two_that_each_take_a_site_for_the_others_do_not_go_round(
    members: tuple[Member, Member],
) -> None:
    """A site that is just moving: each side may know late."""
    async with asyncio.timeout(30):
        status, said = await members[0].ask(MOVED)
    assert (status, said["retry"]) == (503, "5")


@pytest.mark.parametrize("own", [None, "another secret of forty characters and more"])
async def test_only_a_gateway_of_the_cluster_is_a_peer(
    members: tuple[Member, Member], own: str | None, tmp_path: Path
) -> None:
    """Not who shows no certificate, nor one of another secret."""
    _, m2 = members
    context = ssl.create_default_context(cadata=certified(SECRET)[0].decode())
    if own is not None:
        certificate, key = certified(own)
        (tmp_path / "both.pem").write_bytes(certificate + key)
        context.load_cert_chain(tmp_path / "both.pem")
    headers = {"Host": NAME, "X-Forwarded-Host": SHOP}
    with pytest.raises((aiohttp.ClientError, OSError)):
        async with (
            aiohttp.ClientSession() as session,
            session.get(
                f"https://{m2.address}/", headers=headers, server_hostname=NAME, ssl=context
            ) as answer,
        ):
            await answer.read()


async def test_a_member_that_leaves_the_cluster_has_the_configuration_of_one_alone(tmp_path: Path) -> None:
    routes = Caddy(Settings(state_dir=tmp_path))
    routes.create_folders()
    alone = routes.rendered()
    routes.join("[fd00::1]:8445", SECRET)
    clustered = routes.rendered()
    assert clustered.keys() - alone.keys() == {"peers.caddy"}
    assert "https://:8445" in clustered["peers.caddy"] and "bind fd00::1" in clustered["peers.caddy"]
    routes.write()
    routes.leave()
    routes.leave()
    assert routes.rendered() == alone
    routes.write()
    assert not (routes.folder / "peers.caddy").exists()
