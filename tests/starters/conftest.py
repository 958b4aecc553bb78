"""One gateway behind Caddy and one Chromium for all starters."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, async_playwright

from gateway.settings import Settings
from tests.e2e.conftest import CHROMIUM, FLAGS
from tests.integration.conftest import incus_settings
from tests.integration.sites import Hosting, hosting
from tests.starters.trial import GATEWAY

__all__ = ["incus_settings"]


@pytest.fixture(scope="session")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    """A gateway whose tenants are of the default size, on which a site must live."""
    state = tmp_path_factory.mktemp("starters") / "state"
    async with hosting(incus_settings, state, **GATEWAY) as host:
        yield host


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        await browser.close()
