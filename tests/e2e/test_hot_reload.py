"""What an agent edits shows in an open page at once, through Caddy and the dev server's own socket."""

from __future__ import annotations

import base64
from statistics import median

import pytest
from playwright.async_api import Browser

from tests.archives import folder
from tests.bench.vite import TEMPLATES, edits
from tests.integration.sites import Hosting

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


NEXT = """\
install = ["sh", "make.sh"]
start = ["bun", "--bun", "next", "dev", "--hostname", "0.0.0.0", "--port", "$PORT"]
"""
MAKE = b"""\
set -e
bunx create-next-app@16.4.3 made --yes --js --app --empty --no-eslint --no-tailwind --no-src-dir \\
  --no-react-compiler --use-bun --skip-install --disable-git
mv made/* . && rm -r made && bun install
"""


@pytest.mark.timeout(300)
async def test_an_edit_shows_in_a_page_of_next_on_a_real_domain(browser: Browser, host: Hosting) -> None:
    """Its dev server allows `localhost` alone, and its configuration says nothing of the domain."""
    domain = "next.example.com"
    packed = {"archive": base64.b64encode(folder(NEXT, ("make.sh", MAKE))).decode()}
    record = await host.deploy(domain, packed, size="large")
    assert record["state"] == "succeeded", record["error"]
    context = await browser.new_context(ignore_https_errors=True)
    try:
        url = f"https://{domain}:{host.settings.caddy_https}/"
        file = ("app/page.js", "Hello World!")
        assert len(await edits(context, host, url, record["tenant"], file, 2)) == 2
    finally:
        await context.close()
        await host.call("DELETE", f"/v1/tenants/{record['tenant']}")
