"""Each framework's starter, as its own generator makes it, is a site in development and in production."""

from __future__ import annotations

import pytest
from playwright.async_api import Browser

from gateway.settings import Settings
from tests.integration.sites import Hosting
from tests.starters.making import made
from tests.starters.table import STARTERS
from tests.starters.trial import published, tried


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", STARTERS)
async def test_a_starter_is_a_site(
    name: str,
    browser: Browser,
    host: Hosting,
    incus_settings: Settings,
) -> None:
    """An edit shows in its page, and it is published while its dev server goes on."""
    starter = STARTERS[name]
    files = await made(name, starter, incus_settings)
    record = await tried(browser, host, name, starter, files)
    told = [f"{name}: {record['ms'] / 1000:.1f} s, edits {record['edits']}", *record["detected"]["lines"]]
    if files.ours:
        told.append(f"OF OUR OWN PAGES, not of its generator's: {files.ours}")
    tenants = [str(record["tenant"])]
    if starter.published:
        record = await published(browser, host, name, starter, tenants[0])
        told += [f"production: {record['ms'] / 1000:.1f} s", *record["detected"]["lines"]]
        tenants.append(str(record["tenant"]))
    for tenant in tenants:
        await host.call("DELETE", f"/v1/tenants/{tenant}")
    print("\n".join(told))
