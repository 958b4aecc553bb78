"""A site that answers, but refuses the domain of its tenant, is seen and told in its own words."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Sequence
from typing import cast

import pytest

from gateway.deployments.browser import Browser
from gateway.deployments.health import Health
from gateway.events import Bus
from gateway.runtime import probe
from gateway.runtime.sites import Exposure, Sites, TenantSite
from gateway.settings import Settings

DEADLINE = 30
VITE = b'Blocked request. This host ("shop.example.com") is not allowed.\nTo allow it, add it to allowedHosts'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@contextlib.asynccontextmanager
async def serving(status: int, body: bytes, *, own: bool = True) -> AsyncIterator[int]:
    """Serve what is refused under `example.com` and, where not `own`, at the address too."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            refused = not own or b"example.com" in head
            writer.write(b"HTTP/1.1 %d No\r\nX: y\r\n\r\n" % status + body if refused else OK)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def test_a_page_is_asked_for_as_by_a_browser() -> None:
    """Some dev servers, such as Qwik's, answer 404 to whoever does not say that HTML is accepted."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        accepted = re.search(rb"\r\nAccept: text/html,\S", head) is not None
        writer.write(OK if accepted else b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await probe.answer("127.0.0.1", port, "/", DEADLINE, host="shop.example.com") == 200
        async with Browser("127.0.0.1", port, "shop.example.com") as browser:
            assert (await browser.look("/", DEADLINE)).status == 200


async def refused(port: int, host: str | None = "shop.example.com") -> probe.HostRefused | None:
    try:
        await probe.answer("127.0.0.1", port, "/", DEADLINE, host=host)
    except probe.HostRefused as error:
        return error
    return None


@pytest.mark.parametrize(
    ("status", "body", "own", "said"),
    [
        (403, VITE, True, " ".join(VITE.decode().split())),
        (403, b"<h1>Invalid <b>Host</b>  header</h1>", False, "Invalid Host header"),
        (400, b"DisallowedHost: Invalid HTTP_HOST header", False, "DisallowedHost: Invalid HTTP_HOST header"),
        (403, b"", True, "nothing"),
        (421, b"\x1b[31mred\x1b]0;title\x07\x9b\xff\x00", True, "[31mred ]0;title �� �"),
        (403, b"a" * 1_000_000, True, "a" * 300),
        (403, b"<" * 100_000, True, "<" * 300),
    ],
)
async def test_a_refusal_is_told_at_once(status: int, body: bytes, own: bool, said: str) -> None:
    async with asyncio.timeout(DEADLINE), serving(status, body, own=own) as port:
        error = await refused(port)
        assert error is not None and error.status == status
        assert error.said.isprintable() and len(error.said) <= 300
        assert error.said.split()[0][:4] == said.split()[0][:4]


async def test_a_site_that_refuses_everybody_is_waited_for() -> None:
    """It may be asking for a password; what it says is no matter of the domain."""
    async with serving(403, b"Forbidden", own=False) as port:
        with pytest.raises(TimeoutError):
            await probe.answer("127.0.0.1", port, "/", 0.3, host="shop.example.com")


async def test_a_site_without_a_domain_is_asked_at_its_address() -> None:
    async with asyncio.timeout(DEADLINE), serving(403, VITE) as port:
        assert await refused(port, None) is None


async def test_the_health_of_a_site_that_refuses_its_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it hides behind an answer at its address: neither `/site` nor the looks."""

    class Listed:
        async def listed(self) -> Sequence[TenantSite]:
            where = Exposure("127.0.0.1", port)
            return [TenantSite("shop", domain, True, where)]

    class Told:
        def __init__(self) -> None:
            self.events = asyncio.Queue[tuple[str, str]]()

        def publish(self, type: str, tenant: str, data: dict[str, str]) -> None:
            self.events.put_nowait((type, data.get("why", "")))

    told, domain = Told(), "shop.example.com"
    monkeypatch.setattr("gateway.deployments.health.INTERVAL", 0.02)
    async with (
        asyncio.timeout(DEADLINE),
        serving(403, VITE) as port,
        Health(cast(Sites, Listed()), cast(Bus, told), Settings()) as health,
    ):
        site = await health.now("shop")
        assert (site["answers"], site["status"], site["reason"]) == (False, 403, "host_refused")
        assert "allowedHosts" in site["said"]
        kind, why = await told.events.get()
        assert kind == "tenant.unhealthy" and "allowedHosts" in why
        domain = "shop.localhost"
        assert await health.now("shop") == {"answers": True, "status": 200}
        assert (await told.events.get())[0] == "tenant.healthy"
