"""What an agent edits shows in an open page at once, through Caddy and the dev server's own socket."""

from __future__ import annotations

from statistics import median

import pytest
from playwright.async_api import Browser

from tests.bench.vite import TEMPLATES, edits
from tests.integration.sites import Hosting
from tests.starters.making import made
from tests.starters.table import STARTERS
from tests.starters.trial import tried

EDITS = 6
# seconds; 0.3 on a machine that does nothing else (tests/bench/vite)
BOUND = 1.0


_, PATH, TEXT = TEMPLATES["vite-react"]


async def test_an_edit_shows_in_an_open_page(browser: Browser, host: Hosting, site: str) -> None:
    """Every one of them, and half of them in no time."""
    url = f"http://shop.localhost:{host.settings.caddy_http}/"
    took = await edits(browser, host, url, site, (PATH, TEXT), EDITS)
    assert len(took) == EDITS and median(took) < BOUND, took


async def test_an_edit_shows_on_a_real_domain_over_https(browser: Browser, host: Hosting, site: str) -> None:
    """The dev server, which refuses domains that it was not told, is told the new one with it."""
    context = await browser.new_context(ignore_https_errors=True)
    try:
        assert (await host.call("PATCH", f"/v1/tenants/{site}", {"domain": "shop.example.com"}))[0] == 200
        url = f"https://shop.example.com:{host.settings.caddy_https}/"
        assert len(await edits(context, host, url, site, (PATH, TEXT), 2)) == 2
    finally:
        await context.close()
        assert (await host.call("PATCH", f"/v1/tenants/{site}", {"domain": "shop.localhost"}))[0] == 200


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["next", "django"])
async def test_a_starter_shows_an_edit_on_a_real_domain(name: str, browser: Browser, host: Hosting) -> None:
    """Both refuse it: Next's dev server allows `localhost` alone, and so do Django's settings.

    `tests/run starters` tries those of all frameworks.
    """
    starter = STARTERS[name]
    files = await made(name, starter, host.settings)
    record = await tried(browser, host, name, starter, files, slack=3.0)
    await host.call("DELETE", f"/v1/tenants/{record['tenant']}")
