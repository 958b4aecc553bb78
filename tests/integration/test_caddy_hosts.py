"""Which hosts a real Caddy with our configuration serves, and for whom. Needs no Incus."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gateway.caddy import Caddy
from tests.integration import environment
from tests.integration.sites import RealCaddy, settings_for
from tests.live import LiveGateway, local_gateway

SITE, PUBLIC = "site.localhost", "site.example.com"


@pytest.fixture(scope="module")
async def caddy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealCaddy]:
    """A Caddy that leads both domains to a server which says what it was asked for."""

    async def say(request: web.Request) -> web.Response:
        return web.Response(
            text=f"site {request.host}", headers={"Seen": request.headers.get("Origin", "none")}
        )

    app = web.Application()
    app.router.add_get("/{path:.*}", say)
    runner = web.AppRunner(app)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    port = runner.addresses[0][1]
    caddy = RealCaddy(settings_for(environment.settings(), tmp_path_factory.mktemp("state")))
    async with Caddy(caddy.settings) as routes:
        for domain in (SITE, PUBLIC):
            routes.set(domain, f"127.0.0.1:{port}")
        await caddy.start()
        yield caddy
        await caddy.stop()
    await runner.cleanup()


@pytest.fixture
def outside() -> str:
    """An address of this machine that is not loopback: who asks there is as far as a stranger."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))  # nothing is sent
        address = str(probe.getsockname()[0])
    assert not address.startswith("127.")
    return address


async def ask(
    caddy: RealCaddy, address: str, host: str, *, https: bool = False, sni: str | None = None
) -> tuple[int, str]:
    """Return status, and text or where it leads; `sni` is the name that TLS is asked for."""
    port = caddy.settings.caddy_https if https else caddy.settings.caddy_http
    async with (
        aiohttp.ClientSession() as session,
        session.get(
            f"http{'s' if https else ''}://{address}:{port}/",
            headers={"Host": f"{host}:{port}"},
            server_hostname=(sni or host) if https else None,
            ssl=not https,
            allow_redirects=False,
        ) as answer,
    ):
        return answer.status, answer.headers.get("Location") or await answer.text()


async def origin_seen(caddy: RealCaddy, path: str, origin: str | None) -> str:
    """Return the origin that the public site sees of a request of that one."""
    port = caddy.settings.caddy_https
    headers = {"Host": f"{PUBLIC}:{port}"} | ({} if origin is None else {"Origin": origin})
    url = f"https://127.0.0.1:{port}{path}"
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=headers, server_hostname=PUBLIC, ssl=False) as answer,
    ):
        return answer.headers["Seen"]


async def test_sites_of_this_machine_are_served_on_it(caddy: RealCaddy) -> None:
    status, text = await ask(caddy, "127.0.0.1", SITE)
    assert (status, text) == (200, f"site {SITE}:{caddy.settings.caddy_http}")
    assert (await ask(caddy, "127.0.0.1", SITE, https=True))[0] == 200


async def test_sites_of_this_machine_are_not_served_to_others(caddy: RealCaddy, outside: str) -> None:
    status, to = await ask(caddy, outside, SITE)
    assert (status, to) == (308, f"https://{SITE}:{caddy.settings.caddy_https}/")
    assert await ask(caddy, outside, SITE, https=True) == (404, "There is no site at this address.")


@pytest.mark.parametrize(
    "spelled", ["SITE.localhost", "Site.LOCALHOST", "site.localhost.", "SITE.Localhost."]
)
async def test_a_name_is_one_name_however_it_is_spelled(caddy: RealCaddy, outside: str, spelled: str) -> None:
    """On this machine; and for a stranger no spelling opens what another does not."""
    status, text = await ask(caddy, "127.0.0.1", spelled)
    assert (status, text) == (200, f"site {SITE}:{caddy.settings.caddy_http}")
    for sni in (SITE, PUBLIC):
        assert (await ask(caddy, outside, spelled, https=True, sni=sni))[0] == 404
    assert (await ask(caddy, outside, spelled))[0] == 308


@pytest.mark.parametrize("spelled", ["SITE.example.com", "Site.Example.COM", "site.example.com."])
async def test_a_public_name_is_one_name_too(caddy: RealCaddy, outside: str, spelled: str) -> None:
    port = caddy.settings.caddy_https
    assert await ask(caddy, outside, spelled, https=True, sni=PUBLIC) == (200, f"site {PUBLIC}:{port}")


@pytest.mark.parametrize(
    "path", ["/_next/hmr", "/docs/_next/webpack-hmr?id=1", "/__nextjs_original-stack-frames"]
)
@pytest.mark.parametrize(
    ("origin", "seen"),
    [
        ("https://{host}", "https://localhost"),
        ("http://{host}", "as it came"),
        ("https://other.example.com:{port}", "as it came"),
        ("https://{host}.example.net", "as it came"),
        ("https://example.com", "as it came"),
        ("https://{host}:1", "as it came"),
        ("https://x@{host}", "as it came"),
        ("null", "as it came"),
        ("*", "as it came"),
    ],
)
async def test_a_dev_server_of_next_sees_its_own_pages_come_from_this_machine(
    caddy: RealCaddy, path: str, origin: str, seen: str
) -> None:
    """It refuses its hot reload to all others, where nobody configured them; who is foreign stays it."""
    port = caddy.settings.caddy_https
    origin = origin.format(host=f"{PUBLIC}:{port}", port=port)
    assert await origin_seen(caddy, path, origin) == (origin if seen == "as it came" else seen)


async def test_other_paths_and_requests_without_an_origin_stay_as_they_are(caddy: RealCaddy) -> None:
    own = f"https://{PUBLIC}:{caddy.settings.caddy_https}"
    for path in ("/", "/next/hmr", "/api?to=/_next/hmr", "/_nextjs"):
        assert await origin_seen(caddy, path, own) == own
    assert await origin_seen(caddy, "/_next/hmr", None) == "none"


async def test_other_sites_are_served_to_everybody(caddy: RealCaddy, outside: str) -> None:
    for address in ("127.0.0.1", outside):
        assert (await ask(caddy, address, PUBLIC))[0] == 308
        assert (await ask(caddy, address, PUBLIC, https=True))[0] == 200


async def test_a_gateway_on_any_address_knows_who_is_near(tmp_path: Path, outside: str) -> None:
    """`localhost` is for loopback, addresses for everybody; Caddy on this machine asks for any site."""
    gateway: LiveGateway = await local_gateway(tmp_path, "demo")
    gateway.environment["GATEWAY_LISTEN"] = f"0.0.0.0:{gateway.port}"
    gateway.environment["GATEWAY_HOSTS"] = "gw.lan, Gw.example"
    await gateway.start()
    try:
        async with aiohttp.ClientSession() as session:
            for address, host, path, status in (
                (outside, outside, "/metrics", 200),
                (outside, "gw.LAN", "/metrics", 200),
                (outside, "gw.example:1", "/metrics", 200),
                (outside, "evil.example", "/metrics", 421),
                (outside, "no.example", "/v1/wake?domain=no.example", 404),
                ("127.0.0.1", "localhost", "/metrics", 200),
                ("127.0.0.1", "evil.example", "/metrics", 421),
            ):
                url = f"http://{address}:{gateway.port}{path}"
                async with session.get(url, headers={"Host": host}) as answer:
                    assert (answer.status, host) == (status, host)
    finally:
        await gateway.stop()
