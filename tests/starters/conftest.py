"""One gateway behind Caddy and one Chromium for all starters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Browser, async_playwright

from gateway.settings import Settings
from tests.e2e.conftest import CHROMIUM, FLAGS
from tests.integration.conftest import incus_settings
from tests.integration.sites import Hosting, hosting

__all__ = ["incus_settings"]


@pytest.fixture(scope="session")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    """A gateway whose tenants are of the default size, on which a site must live."""
    state = tmp_path_factory.mktemp("starters") / "state"
    changes: dict[str, Any] = {"tenant_memory": "1GiB", "verify_timeout": 150.0, "settle_time": 3.0}
    async with hosting(incus_settings, state, **changes) as host:
        yield host


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        await browser.close()
