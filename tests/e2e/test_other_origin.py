"""A page of another origin with the TypeScript client in it, as a browser developer has one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from playwright.async_api import Browser, Error

from tests.e2e.conftest import ADDRESS
from tests.e2e.test_editor import run
from tests.integration.sites import Hosting
from tests.typescript import PACKAGE, built

USED = "([url, token]) => import('/used.js').then(({used}) => used(url, token))"
ASKED = "([url, token]) => import('/client/index.js').then(m => new m.Gateway(url, {token})"


@pytest.fixture
async def pages(host: Hosting, desk: str) -> AsyncIterator[str]:
    """The listed origin, with the client as it is built there, and what uses each way of it."""
    used = (PACKAGE / "tests/edge.js").read_text()
    used = used.replace("@incus-gateway/client", "/client/index.js").replace('"demo"', f'"{desk}"')
    assert "new Blob(" in used
    used = used.replace("]).stream();", "]);")  # Chromium sends streams by HTTP/2 alone

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html>", content_type="text/html")

    async def script(_: web.Request) -> web.Response:
        return web.Response(text=used, content_type="text/javascript")

    app = web.Application()
    app.add_routes([web.get("/", page), web.get("/used.js", script), web.static("/client", await built())])
    runner = web.AppRunner(app)
    await runner.setup()
    (origin,) = host.settings.origins
    parts = urlsplit(origin)
    await web.TCPSite(runner, parts.hostname, parts.port).start()
    yield origin
    await runner.cleanup()


async def test_a_page_of_a_listed_origin_has_all_of_the_client_and_another_none(
    browser: Browser, host: Hosting, desk: str, pages: str
) -> None:
    given = [f"http://{ADDRESS}:{host.settings.caddy_http}", host.gateway.token(desk)]
    async with await browser.new_context() as context:
        page = await context.new_page()
        await page.goto(pages)
        found = await page.evaluate(USED, given)
        assert "Hello ✓" in found.pop("read")
        assert found == {
            "stdout": "as typed",
            "exit": 3,
            "slow": "cancelled",
            "event": "tool.finished",
            "size": 1 << 20,
            "tenants": [desk],
            "ran": "by HTTP\n",
        }
        # the same page by another name of the machine
        await page.goto(pages.replace("127.0.0.1", "localhost"))
        for way in ("tenants()", f"tenant('{desk}').connect()"):
            with pytest.raises(Error, match=r"does not let pages of .* in: .* GATEWAY_ORIGINS"):
                await page.evaluate(f"{ASKED}.{way})", given)
    run(desk, "rm -f hello.txt large")
