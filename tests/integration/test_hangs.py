"""Sites that hang: visitors get a page in time, and slow answers are not cut off."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest

from gateway.rootfs import process_tree, site_cgroup
from gateway.settings import Settings
from tests.archives import archive
from tests.contracts.processes import alive, mark
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import pause, until

pytestmark = pytest.mark.timeout(200)
TENANT, DOMAIN = "hangs-test", "hangs.test"
HANGS = 2.0  # seconds after which a site that reads nothing hangs
PAGE = 4  # seconds within which a visitor of a hanging site gets a page
SLOW = 5  # seconds of silence before the first byte: no visitor of a hanging site waits so long

SITE = (
    b"""\
Bun.serve({ port: process.env.PORT, hostname: "0.0.0.0", idleTimeout: 60, fetch: async (request) => {
  const path = new URL(request.url).pathname;
  if (path !== "/") await Bun.write("/home/site/taken" + path.replace("/", "-"), "");
  if (path === "/slow") await Bun.sleep(%d000);
  if (path === "/spin") for (const end = Date.now() + 6_000; Date.now() < end; );
  return new Response("here");
} });
"""
    % SLOW
)


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    template = {"archive": base64.b64encode(archive(("serve.ts", SITE))).decode()}
    state = tmp_path_factory.mktemp("hangs") / "state"
    async with hosting(
        incus_settings, state, constants={"gateway.deployments.health.HANG_TIMEOUT": HANGS}
    ) as host:
        record = await host.deploy(DOMAIN, template)
        assert record["state"] == "succeeded", record["error"]
        yield host


@pytest.fixture
async def browser() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        yield session


async def visit(
    host: Hosting, browser: aiohttp.ClientSession, path: str = "/", method: str = "GET"
) -> tuple[int, str, Mapping[str, str], float]:
    """Request the site through Caddy; return status, text, headers and the seconds it took."""
    began = time.monotonic()
    url = f"http://127.0.0.1:{host.settings.caddy_ask}{path}"
    async with browser.request(method, url, headers={"Host": DOMAIN, "Accept": "text/html"}) as answer:
        return answer.status, await answer.text(), answer.headers, time.monotonic() - began


def processes() -> list[int]:
    return process_tree.pids(environment.cgroup(TENANT) / site_cgroup.SITE)


async def taken(host: Hosting, browser: aiohttp.ClientSession, path: str) -> asyncio.Future[Any]:
    """Start a visit; return once the site has read the request."""
    mark = environment.rootfs(TENANT) / f"home/site/taken{path.replace('/', '-')}"
    mark.unlink(missing_ok=True)
    visiting = asyncio.ensure_future(visit(host, browser, path))
    await until(mark.exists)
    return visiting


@contextlib.contextmanager
def stopped() -> Any:
    """Stop all processes of the site while the context is open."""
    pids = processes()
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def told_health(host: Hosting) -> AsyncIterator[AsyncGenerator[tuple[str, Any]]]:
    """Yield the site's health events from now on."""
    async with (
        host.gateway.http("*") as session,
        session.get("/v1/events", params={"tenant": TENANT, "type": "tenant.*"}) as stream,
    ):

        async def events() -> AsyncGenerator[tuple[str, Any]]:
            async for line in stream.content:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if event["type"].endswith("healthy"):
                        yield event["type"], event["data"]

        yield events()


async def answers(host: Hosting, browser: aiohttp.ClientSession) -> None:
    """Wait until the site answers again."""

    async def so() -> bool:
        return (await visit(host, browser))[0] == 200

    await until(so, every=0.1)


def is_page(seen: tuple[int, str, Mapping[str, str], float]) -> None:
    status, text, headers, _ = seen
    assert (status, headers["Retry-After"]) == (503, "5"), seen
    assert "Back in a moment" in text and "10." not in text and TENANT not in text, text


async def test_who_comes_right_after_a_site_froze_gets_the_page_in_time(
    host: Hosting, browser: aiohttp.ClientSession
) -> None:
    """On new and on kept connections, with any method; the site comes back by itself."""
    await answers(host, browser)
    async with asyncio.timeout(60), told_health(host) as told:
        await visit(host, browser)  # so that Caddy keeps a connection
        with stopped():
            seen = await asyncio.gather(
                *(visit(host, browser, method="POST") for _ in range(2)),
                *(visit(host, browser) for _ in range(3)),
            )
            print("\npages after", sorted(round(one[3], 2) for one in seen))
            for one in seen:
                is_page(one)
            assert max(one[3] for one in seen) < PAGE, seen
            kind, facts = await anext(told)
            assert kind == "tenant.unhealthy" and "read no request" in facts["why"], facts
            at_once = await visit(host, browser)
            is_page(at_once)
            assert at_once[3] < 1, at_once
        assert (await anext(told))[0] == "tenant.healthy"
    await answers(host, browser)


async def test_a_tenant_that_is_paused_is_answered_for(host: Hosting, browser: aiohttp.ClientSession) -> None:
    """Paused by Incus, so that all processes of the container are frozen."""
    await answers(host, browser)
    environment.incus("pause", TENANT)
    try:
        seen = await visit(host, browser)
        is_page(seen)
        assert seen[3] < PAGE, seen
    finally:
        environment.incus("resume", TENANT)
    await answers(host, browser)


async def test_who_waits_for_a_slow_answer_gets_it(host: Hosting, browser: aiohttp.ClientSession) -> None:
    """The site answers others meanwhile; if it froze for a while, requests it had read continue."""
    await answers(host, browser)
    status, _, _, seconds = await visit(host, browser, "/slow")
    assert status == 200 and seconds >= SLOW
    slow = await taken(host, browser, "/slow")
    with stopped():
        is_page(await visit(host, browser))
        assert not slow.done()
    assert (await slow)[0] == 200


async def test_a_site_that_only_computes_is_answered_for(
    host: Hosting, browser: aiohttp.ClientSession
) -> None:
    """The first visitor gets the answer late; those who come meanwhile get the page in time."""
    await answers(host, browser)
    first = await taken(host, browser, "/spin")
    second = await visit(host, browser)
    is_page(second)
    assert second[3] < PAGE, second
    assert (await first)[0] == 200
    await answers(host, browser)


# --- what a tenant lets hang holds up nobody else ------------------------------------------------------


@contextlib.asynccontextmanager
async def asked(host: Hosting, count: int, method: str, path: str, body: Any = None) -> AsyncIterator[None]:
    """Have a client of the tenant ask so often at once, and leave in the end."""
    async with host.gateway.http(TENANT) as session:

        async def one() -> None:
            async with session.request(method, f"/v1/tenants/{TENANT}/{path}", json=body) as answer:
                await answer.read()

        asking = [asyncio.create_task(one()) for _ in range(count)]
        try:
            await pause(1)  # until all have been taken in, which nothing shows
            yield
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)


@pytest.fixture(scope="module")
async def other(host: Hosting) -> str:
    record = await host.deploy("other-hangs.test")
    assert record["state"] == "succeeded", record["error"]
    return str(record["tenant"])


async def test_looks_at_a_site_that_accepts_and_says_nothing_hold_up_nobody_elses(
    host: Hosting, other: str
) -> None:
    with stopped():
        async with asked(host, 96, "GET", "site"):
            began = time.monotonic()
            status, said, _ = await host.call("GET", f"/v1/tenants/{other}/site", tenants=(other,))
            seconds = time.monotonic() - began
    print(f"\nanother's look took {seconds:.2f} s")
    assert (status, said["answers"]) == (200, True) and seconds < 2, (said, seconds)


async def test_publishes_whose_tar_hangs_hold_up_nobody_elses(host: Hosting, other: str) -> None:
    """And nothing of them is left once their client has gone."""
    seconds_asleep = mark()
    hanging = f"printf '#!/bin/sh\\nexec sleep {seconds_asleep}\\n' >/usr/bin/tar && chmod +x /usr/bin/tar"
    environment.incus("exec", TENANT, "--", "sh", "-c", f"mv /usr/bin/tar /usr/bin/tar.real && {hanging}")
    try:
        async with asked(host, 4, "POST", "publish", {"domain": "not-hangs.test"}):
            await until(lambda: alive(seconds_asleep) == 1)  # one at a time for each owner
            began = time.monotonic()
            body = {"domain": "published-hangs.test", "tenant": "published-hangs"}
            covered = (other, "published-hangs")
            status, begun, _ = await host.call("POST", f"/v1/tenants/{other}/publish", body, tenants=covered)
            seconds = time.monotonic() - began
        print(f"\nanother's publish took {seconds:.2f} s")
        assert status == 202 and seconds < 10, (begun, seconds)
        assert (await host.ended(begun["id"]))["state"] == "succeeded"
        await until(lambda: alive(seconds_asleep) == 0)
    finally:
        environment.incus("exec", TENANT, "--", "mv", "/usr/bin/tar.real", "/usr/bin/tar")
