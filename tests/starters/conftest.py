"""One gateway behind Caddy and one Chromium for all starters; what changed since today's last run."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest
from playwright.async_api import Browser, async_playwright

from gateway.host.toolchain import CACHE
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


KEPT: Final = CACHE / "today.json"  # of each starter when it was tried last: result, why, versions


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell what is not as at the last run of `tests/run today`, and keep how it is now."""
    if not os.environ.get("GATEWAY_TEST_TODAY"):
        return
    before: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    now = dict(before)
    for kind in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(kind, ()):
            if "test_starters.py" in report.nodeid and (report.when == "call" or kind == "error"):
                name = report.nodeid.rpartition("[")[2].rstrip("]")
                why = "" if kind == "passed" else str(report.longreprtext)
                result = "the world" if "THE WORLD" in why else "works" if kind == "passed" else "FAILS"
                found = dict(report.user_properties).get("versions") or before.get(name, {}).get(
                    "versions", {}
                )
                now[name] = {
                    "result": result,
                    "why": why[-2000:],
                    "versions": found,
                    "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                }
    terminalreporter.section("today's world")
    for name, one in sorted(now.items()):
        if one == before.get(name):
            continue
        was = before.get(name, {"result": "new", "versions": {}})
        newer = [
            f"{package} {was['versions'].get(package, '-')} -> {version}"
            for package, version in one["versions"].items()
            if was["versions"].get(package) != version
        ]
        told = one["result"] if one["result"] == was["result"] else f"{was['result']} -> {one['result']}"
        terminalreporter.line(f"{name}: {told}{'; ' if newer else ''}{', '.join(newer[:12])}")
        if one["why"]:
            terminalreporter.line(f"  {one['why'].strip().splitlines()[-1][:300]}")
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    KEPT.write_text(json.dumps(now, indent=1))
