"""Each framework's starter, as its own generator makes it, is a site in development and in production."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from playwright.async_api import Browser

from gateway.settings import MiB, Settings
from tests.bench.frameworks import Meter
from tests.integration import environment
from tests.integration.sites import Hosting
from tests.starters.making import made
from tests.starters.table import STARTERS
from tests.starters.trial import published, stays, tried


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
    with Meter(f"{name}-example-com").running() as meter:
        record = await tried(browser, host, name, starter, files)
        await stays(host, str(record["tenant"]))
    told = [row(name, record, meter), f"edits were seen within {record['edits']} s"]
    if files.ours:
        told.append(f"OF OUR OWN PAGES, not of its generator's: {files.ours}")
    tenants = [str(record["tenant"])]
    if starter.published:
        with Meter(f"{name}-built-example-com").running() as meter:
            record = await published(browser, host, name, starter, tenants[0])
            tenants.append(str(record["tenant"]))
            await stays(host, tenants[1])
        told.append(row(name, record, meter))
    for tenant in tenants:
        await host.call("DELETE", f"/v1/tenants/{tenant}")
    print("\n".join(told))


def row(name: str, record: Mapping[str, Any], meter: Meter) -> str:
    """Return what a deployment took, as `docs/deployments.md` has it: seconds and MiB."""
    peak, rest = (round(size / MiB) for size in (meter.peak, meter.rest))
    seconds, files = record["ms"] / 1000, disk(record["tenant"])
    facts = f"{seconds:.1f} s, {peak} MiB at its peak, {rest} at rest, {files} on disk"
    return "\n  ".join((f"{name}: {facts}", *record["detected"]["lines"]))


def disk(tenant: str) -> int:
    return int(environment.incus("exec", tenant, "--", "du", "-sxm", "/srv/site").stdout.split()[0])
