"""Deploys a starter without a manifest, works on it as an agent does, and publishes it, seen by Chromium."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

from playwright.async_api import Browser, Page, Request, Response, WebSocket
from playwright.async_api import TimeoutError as PlaywrightTimeout

from tests.bench.vite import PACE, unwell
from tests.integration.sites import Hosting, Visitors
from tests.live import Wire
from tests.starters.making import Made, World
from tests.starters.table import Starter
from tests.waits import pause, until

WITHIN: Final[Mapping[str, float]] = {
    "at once": 1.5,
    "by a reload": 1.5,
    "after a restart": 3.0,
    "after a slow restart": 30.0,
    "on a visit": 3.0,
}
"""Seconds from an edit's answer until its page shows it: of the median."""

GATEWAY: Final[Mapping[str, Any]] = {"verify_timeout": 150.0, "settle_time": 3.0}
"""Settings as an operator has them by default, on a machine that is busy."""

SIZE: Final = "medium"
"""What has the memory that a tenant has by default: the tests' own profile gives less."""

# what package managers say of a registry that is away
_AWAY: Final = re.compile(r"ENOTFOUND|EAI_AGAIN|ETIMEDOUT|ERR_SOCKET_TIMEOUT|error sending request for url")
_RESTARTED: Final = ("after a restart", "after a slow restart")
_PATIENCE: Final = 60.0  # seconds
_EDITS: Final = 3
_SETTLE: Final = 4.0  # seconds
# what seems to be kept out by the live site is tried in its place
_FAILS: Final = 'start = ["sh", "-c", "echo already in use; exit 1"]'


@dataclass
class Seen:
    """What a page met on its way, beside what it shows."""

    domain: str
    throws: str = ""
    """What a known error says that is no fault of the gateway."""
    known: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)
    awaited: dict[str, float] = field(default_factory=dict)
    """Requests without an answer, and when they were made."""

    def of(self, page: Page) -> None:
        page.on("pageerror", lambda error: self._threw(str(error)))
        page.on("request", self._asked)
        page.on("requestfinished", self._ended)
        page.on("requestfailed", self._ended)
        page.on("response", self._answered)
        page.on("websocket", self._opened)

    def _threw(self, error: str) -> None:
        (self.known if self.throws and self.throws in error else self.wrong).append(error)

    def _asked(self, request: Request) -> None:
        self.awaited[request.url] = time.monotonic()

    def _ended(self, request: Request) -> None:
        self.awaited.pop(request.url, None)

    def _answered(self, response: Response) -> None:
        where = urlsplit(response.url)
        if where.hostname == self.domain and response.status >= 400 and where.path != "/favicon.ico":
            self.wrong.append(f"{response.status} {where.path}")

    def _opened(self, socket: WebSocket) -> None:
        self.sockets.append(socket.url)
        socket.on("socketerror", lambda said: self.wrong.append(f"{socket.url}: {said}"))


async def worked_on(
    browser: Browser, host: Hosting, domain: str, starter: Starter, record: Mapping[str, Any]
) -> list[float]:
    """Edit a deployed starter as an agent does, there and back; return the seconds until each was seen."""
    tenant = str(record["tenant"])
    url = f"https://{domain}:{host.settings.caddy_https}{starter.path}"
    seen = Seen(domain, starter.throws)
    context = await browser.new_context(ignore_https_errors=True)
    try:
        page = await context.new_page()
        seen.of(page)
        await page.goto(url)
        await shows(page, starter.says)
        assert not seen.wrong, seen.wrong
        await page.evaluate("() => { window.kept = true }")
        if starter.shows not in (*_RESTARTED, "on a visit"):
            await connected(seen)
            assert {urlsplit(socket).netloc for socket in seen.sockets} == {urlsplit(url).netloc}, seen
            with contextlib.suppress(
                PlaywrightTimeout
            ):  # an edit before it is hydrated is an error of its own
                await page.wait_for_load_state("networkidle", timeout=10_000)
            await pause(1.0)  # the page tells nobody when it listens to its dev server
        took = []
        async with host.gateway.wire(tenant) as wire:
            path, old, new = starter.edit
            await wire.call("tools/call", name="Read", arguments={"file_path": f"/srv/site/{path}"})
            for number in range(_EDITS):
                before, after, text = (new, old, starter.says) if number % 2 else (old, new, starter.then)
                await pause(PACE)
                answered = await edited(wire, path, before, after)
                if starter.shows == "on a visit":  # its scripts write what the page shows
                    await page.reload()
                    await shows(page, text)
                elif starter.shows in _RESTARTED:
                    await _comes(host, domain, starter.path, text)
                else:
                    await shows(page, text)
                took.append(round(time.monotonic() - answered, 2))
        kept = await page.evaluate("() => window.kept === true")
        anew = starter.shows in ("by a reload", "on a visit")
        assert kept != anew, f"the page was {'not ' if kept else ''}loaded anew"
        if starter.shows == "at once":
            assert not seen.wrong, seen.wrong
    finally:
        await context.close()
    assert not (why := unwell(tenant)), why
    if starter.throws:
        print(f"THE WORLD: its page throws {seen.known or 'no longer what the table says'}")
    return took


async def connected(seen: Seen) -> None:
    """Return once a page has opened a websocket; fail with what it waits for instead."""
    try:
        await until(lambda: seen.sockets, _PATIENCE)
    except AssertionError:
        now = time.monotonic()
        awaited = {url: f"{now - since:.0f} s" for url, since in list(seen.awaited.items())[:10]}
        raise AssertionError(
            f"the page opens no websocket; it waits for {awaited}, met {seen.wrong}"
        ) from None


async def stays(host: Hosting, tenant: str) -> None:
    """See a site stay up for a while after all that was done to it."""
    await pause(_SETTLE)
    status, site, _ = await host.call("GET", f"/v1/tenants/{tenant}/site")
    assert status == 200 and site["answers"], site
    assert not (why := unwell(tenant)), why


async def edited(wire: Wire, path: str, old: str, new: str) -> float:
    """Have an agent edit a file; return when that was answered."""
    arguments = {"file_path": f"/srv/site/{path}", "old_string": old, "new_string": new}
    said = await wire.call("tools/call", name="Edit", arguments=arguments)
    assert not said.get("isError"), said
    return time.monotonic()


async def shows(page: Page, text: str) -> None:
    """Return once a page has a text; fail with what it has instead."""
    try:
        await page.get_by_text(text, exact=False).first.wait_for(timeout=_PATIENCE * 1000, state="attached")
    except PlaywrightTimeout:
        there = await page.locator("body").inner_text()
        raise AssertionError(f"the page shows no {text!r}, but: {there[:1000]}") from None


async def _comes(host: Hosting, domain: str, path: str, text: str) -> None:
    async def so() -> bool:
        return text in (await host.visit(domain, path, https=True))[1]

    await until(so, _PATIENCE, every=0.05)


async def tried(
    browser: Browser, host: Hosting, name: str, starter: Starter, made: Made, slack: float = 1.0
) -> dict[str, Any]:
    """Deploy a starter without a manifest and work on it; return the deployment's record and the times.

    `slack` is how many times as long an edit may take, beside other tests.
    """
    domain = f"{name}.example.com"
    body = {"domain": domain, "template": made.template, "size": SIZE}
    status, begun, _ = await host.call("POST", "/v1/deployments", body)
    assert status == 202, begun
    record = await ended(host, begun["id"])
    assert record["detected"]["title"] == starter.title, record["detected"]
    took = await worked_on(browser, host, domain, starter, record)
    within = WITHIN[starter.shows] * slack
    assert median(took) <= within, f"{took} seconds, and {within} at most"
    return {**record, "edits": took}


async def published(
    browser: Browser, host: Hosting, name: str, starter: Starter, tenant: str
) -> dict[str, Any]:
    """Publish a starter that was worked on; return the deployment's record. Its dev server goes on."""
    domain = f"{name}-built.example.com"
    status, begun, _ = await host.call(
        "POST", f"/v1/tenants/{tenant}/publish", {"domain": domain, "size": SIZE}
    )
    assert status == 202, begun
    record = await ended(host, begun["id"])
    seen = Seen(domain)
    context = await browser.new_context(ignore_https_errors=True)
    try:
        page = await context.new_page()
        seen.of(page)
        await page.goto(f"https://{domain}:{host.settings.caddy_https}{starter.path}")
        await shows(page, starter.then.replace(f"{name}.", f"{name}-built."))
        assert not seen.wrong, seen.wrong
        # a page of Streamlit opens a websocket in production, too
        assert not seen.sockets or starter.shows == "on a visit", "a dev server's page"
    finally:
        await context.close()
    assert (await host.visit(f"{name}.example.com", starter.path, https=True))[0] == 200
    assert not (why := unwell(tenant)), why
    return record


async def ended(host: Hosting, deployment: str, state: str = "succeeded") -> dict[str, Any]:
    """Return the record of a deployment, which ends in `state`. Raises `World` where a registry is away."""
    record = await host.ended(deployment, 300)
    if record["state"] != state and (away := _AWAY.search(record["error"]["message"])):
        raise World(f"a registry does not answer ({away[0]}): {record['error']['message']}")
    assert record["state"] == state, (
        f"{record['kind']}: {record['error']} {record['detected']} {record['phases']}"
    )
    return record


async def refused(host: Hosting, name: str, starter: Starter, tenant: str) -> None:
    """See a starter that has no production be refused with the line to write, and nothing be made."""
    body = {"domain": f"{name}-built.example.com", "size": SIZE}
    status, said, _ = await host.call("POST", f"/v1/tenants/{tenant}/publish", body)
    error = said if status >= 400 else (await host.ended(said["id"], 300))["error"]
    assert starter.refused in error["message"], error
    assert (await host.call("GET", f"/v1/tenants/{name}-built-example-com"))[0] == 404


async def changed(host: Hosting, name: str, starter: Starter, made: Made, times: int = 1) -> dict[str, Any]:
    """Update a starter, roll that back, set its environment and break it; return the first update's record.

    Of updates there are as many as `times`. Visitors ask each 50 ms, and get no error.
    """
    domain, tenant = f"{name}.example.com", f"{name}-example-com"
    path, _, new = starter.edit
    visitors = Visitors(host, domain, path=starter.path)
    records = list[dict[str, Any]]()
    body = {"domain": domain, "size": SIZE}
    broken = {"template": made.with_files({"site.toml": _FAILS}).template}

    async def edited() -> bool:
        async with (
            host.gateway.http(tenant) as session,
            session.get(f"/v1/tenants/{tenant}/files/{path}") as said,
        ):
            return new in await said.text()

    def update(number: int) -> tuple[str, str, str, dict[str, Any], str]:
        another = {"template": made.with_files({"touched.txt": str(number)}).template}
        return "update", "POST", "/v1/deployments", body | another, "succeeded"

    was = await edited()
    for what, method, url, given, state in (
        update(0),
        ("rollback", "POST", f"/v1/tenants/{tenant}/rollback", {}, "succeeded"),
        ("env", "PATCH", f"/v1/tenants/{tenant}/env", {"env": {"GREETING": "hello"}}, "succeeded"),
        ("broken", "POST", "/v1/deployments", body | broken, "rolledback"),
        *(update(number) for number in range(1, times)),
    ):
        async with visitors.watching(what):
            status, begun, _ = await host.call(method, url, given)
            assert status == 202, begun
            records.append(await ended(host, begun["id"], state))
        assert await edited() is (was and what != "update"), what
        print(name, what, {phase["name"]: phase["ms"] for phase in records[-1]["phases"]})
    assert not (why := unwell(tenant)), why
    return records[0]
