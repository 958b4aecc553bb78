"""What an agent edits shows in an open page at once, through Caddy and the dev server's own socket."""

from __future__ import annotations

from statistics import median

from playwright.async_api import Browser

from tests.bench.vite import TEMPLATES, edits
from tests.integration.sites import Hosting

EDITS = 6
# seconds; 0.3 on a machine that does nothing else (tests/bench/vite)
BOUND = 1.0


async def test_an_edit_shows_in_an_open_page(browser: Browser, host: Hosting, site: str) -> None:
    """Every one of them, and half of them in no time."""
    _, path, text = TEMPLATES["vite-react"]
    took = await edits(browser, host, "shop.localhost", site, (path, text), EDITS)
    assert len(took) == EDITS and median(took) < BOUND, took
