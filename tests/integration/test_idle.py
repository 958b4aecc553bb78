"""Unvisited sites in real containers fall asleep, and the first visitor through a real Caddy wakes them.

GATEWAY_TEST_WAKES is how often a site is visited while it falls asleep, at random moments.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.caddy import Caddy
from gateway.settings import Settings
from tests.contracts.gateway import no_traceback, sse
from tests.contracts.idle import echo, get, told
from tests.integration import environment
from tests.integration.sites import Hosting, RealCaddy, hosting, settings_for
from tests.waits import pause, until

WAKES = int(os.environ.get("GATEWAY_TEST_WAKES", "2"))
DOMAIN, TENANT = "sleepy.example.com", "sleepy-example-com"
LIMIT = 1.0
KEPT = 1.0  # seconds that Caddy keeps a connection to the site; only then the limit begins

# a server that answers /slow only after a second request tells it to, and POST with the length received
SITE = """
let release = [];
Bun.serve({
  port: process.env.PORT, hostname: "0.0.0.0", idleTimeout: 60,
  websocket: {message(ws, text) { ws.send(text) }},
  async fetch(request, server) {
    const path = new URL(request.url).pathname;
    if (path === "/ws" && server.upgrade(request)) return;
    if (path === "/slow") await new Promise((done) => release.push(done));
    if (path === "/release") { release.forEach((done) => done()); release = []; }
    return new Response(`${request.method} ${(await request.arrayBuffer()).byteLength}`);
  },
});
"""


@pytest.fixture(scope="module")
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    folder = tmp_path_factory.mktemp("idle")
    template = folder / "templates" / "sleepy"
    template.mkdir(parents=True)
    (template / "site.toml").write_text('start = ["bun", "site.js"]\nport = 3000\n')
    (template / "site.js").write_text(SITE)
    changes: dict[str, Any] = {
        "templates_dir": template.parent,
    }
    constants = {"gateway.lifecycle.idle.LOOK_INTERVAL": 0.2, "gateway.caddy.caddy.KEEPALIVE": KEPT}
    constants["gateway.deployments.health.INTERVAL"] = 1.0
    async with hosting(incus_settings, folder / "state", constants=constants, **changes) as host:
        record = await host.deploy(DOMAIN, "sleepy")
        assert record["state"] == "succeeded", record["error"]
        # only this one, since other tests' tenants are in the same Incus
        environment.configure(TENANT, "user.gateway.idle_stop", str(LIMIT))
        yield host
        await no_traceback(host.gateway)


async def asleep(host: Hosting, events: aiohttp.ClientResponse) -> None:
    """Wait until the tenant sleeps; `events` must have been subscribed to before its last use."""
    async with host.gateway.http(TENANT) as http:
        found = await get(http, TENANT)
        if found["asleep"] and found["status"] == "stopped":  # the mark is set before the stop
            return
    while (event := (await sse(events, 1))[0])["event"] != "tenant.stopped":
        pass
    assert event["data"]["data"]["reason"] == "idle"


async def stays_awake(host: Hosting) -> None:
    """Watch for longer than Caddy keeps an idle connection plus the limit."""
    deadline = time.monotonic() + KEPT + LIMIT + 1
    async with host.gateway.http(TENANT) as http:
        while time.monotonic() < deadline:
            assert (await get(http, TENANT))["status"] == "running"
            await pause(0.2)


def visitor(host: Hosting) -> aiohttp.ClientSession:
    url = f"http://127.0.0.1:{host.settings.caddy_ask}"
    return aiohttp.ClientSession(url, headers={"Host": DOMAIN})


async def test_a_sleeping_site_is_woken_by_its_first_visitors(host: Hosting) -> None:
    """All who come meanwhile are served, with their bodies; a tool call wakes it too."""
    routes = host.settings.state_dir / "caddy" / "routes"
    async with host.gateway.http(TENANT) as http, told(host.gateway, TENANT, "tenant.*") as events:
        await host.visit(DOMAIN)
        await asleep(host, events)
        assert (routes / DOMAIN).readlink().name.startswith("asleep_")
        found = await get(http, TENANT)
        assert (found["status"], found["asleep"]) == ("stopped", True)
        async with visitor(host) as session:

            async def post(size: int) -> tuple[int, str]:
                async with session.post("/", data=io.BytesIO(b"x" * size)) as answer:
                    return answer.status, await answer.text()

            sizes = [1, 200_000, 3_000_000]
            assert await asyncio.gather(*map(post, sizes)) == [(200, f"POST {size}") for size in sizes]
        assert not (routes / DOMAIN).readlink().name.startswith("asleep_")
        while (started := (await sse(events, 1))[0])["event"] != "tenant.started":
            pass
        assert started["data"]["data"]["reason"] == "wake"
        await asleep(host, events)
        assert await echo(http, TENANT) == "awake"
        assert (await get(http, TENANT))["status"] == "running"


async def test_a_websocket_and_a_request_without_an_answer_keep_a_site_awake(host: Hosting) -> None:
    """The gateway's own probes every second do not."""
    async with told(host.gateway, TENANT, "tenant.*") as events:
        async with visitor(host) as session, session.ws_connect("/ws") as websocket:
            await stays_awake(host)
            await websocket.send_str("still there")
            assert await websocket.receive_str() == "still there"
        slow = asyncio.create_task(host.visit(DOMAIN, "/slow"))
        await stays_awake(host)
        assert await host.visit(DOMAIN, "/release") == (200, "GET 0")
        assert await slow == (200, "GET 0")
        await asleep(host, events)


async def test_a_site_is_put_to_sleep_on_request_but_not_while_it_is_visited(host: Hosting) -> None:
    """Even without a limit of its own; the next visitor wakes it."""
    environment.configure(TENANT, "user.gateway.idle_stop", "0")
    try:
        async with host.gateway.http(TENANT) as http, visitor(host) as session:
            async with session.ws_connect("/ws") as socket:
                await socket.send_str("here")
                assert await socket.receive_str() == "here"
                async with http.post(f"/v1/tenants/{TENANT}/sleep") as response:
                    refused = await response.json()
                    assert (response.status, refused["reason"]) == (409, "in_use")
                assert "a visitor is connected" in refused["detail"]
            found: dict[str, Any] = {"code": "conflict"}
            while found.get("code") == "conflict":  # until Caddy has closed its connection
                async with http.post(f"/v1/tenants/{TENANT}/sleep") as response:
                    found = await response.json()
            assert (found["status"], found["asleep"]) == ("stopped", True)
            async with session.get("/") as woken:
                assert (woken.status, await woken.text()) == (200, "GET 0")
            assert (await get(http, TENANT))["status"] == "running"
    finally:
        environment.configure(TENANT, "user.gateway.idle_stop", str(LIMIT))


async def test_who_was_stopped_by_somebody_is_not_woken(host: Hosting) -> None:
    async with host.gateway.http(TENANT) as http, told(host.gateway, TENANT, "tenant.*") as events:
        await asleep(host, events)
        async with http.post(f"/v1/tenants/{TENANT}/stop") as response:
            assert (await response.json())["asleep"] is False
        status, _ = await host.visit(DOMAIN)
        assert status == 502
        assert (await get(http, TENANT))["status"] == "stopped"
        async with http.post(f"/v1/tenants/{TENANT}/start") as response:
            assert response.status == 200


async def test_no_visitor_is_lost_while_a_site_falls_asleep(host: Hosting) -> None:
    chance, statuses = random.Random(7), []
    for _ in range(WAKES):
        # the stop takes about a second
        await pause(chance.uniform(KEPT + LIMIT, KEPT + LIMIT + 3))
        visits = (host.visit(DOMAIN) for _ in range(5))
        statuses += [status for status, _ in await asyncio.gather(*visits)]
    assert statuses == [200] * 5 * WAKES


async def test_a_site_sleeps_on_while_the_gateway_is_started_again(host: Hosting) -> None:
    async with told(host.gateway, TENANT, "tenant.*") as events:
        await host.visit(DOMAIN)
        await asleep(host, events)
    await host.gateway.stop()
    async with visitor(host) as session:
        visiting = asyncio.create_task(session.ws_connect("/ws"))  # Caddy waits for the gateway
        await host.gateway.start()
        async with await visiting as websocket:
            await websocket.send_str("hello")
            assert await websocket.receive_str() == "hello"


async def test_a_renamed_clone_that_sleeps_is_woken_by_its_visitors(host: Hosting) -> None:
    """Even one without a fixed address, like clones of earlier versions."""

    async def cloned(name: str, domain: str) -> None:
        status, made, _ = await host.call("POST", f"/v1/tenants/{TENANT}/clone", {"tenant": name})
        assert status == 201, made
        if name == "old":
            await asyncio.to_thread(loosen, name)
        assert (await host.call("PATCH", f"/v1/tenants/{name}", {"domain": domain}))[0] == 200
        await host.answers(domain)
        environment.configure(name, "user.gateway.idle_stop", str(LIMIT))

    copies = {name: f"{name}.example.com" for name in ("new", "old")}
    await asyncio.gather(*(cloned(*copy) for copy in copies.items()))
    routes = Caddy(host.settings)
    for number in range(2):
        await asyncio.gather(*(sleeps(host, name) for name in copies))
        # reconciling routes keeps those of sleeping tenants and removes those that belong to nobody
        routes.set("nobodys.example.com", "127.0.0.1:9")
        environment.configure(TENANT, "user.looked", f"at {number}")
        await until(lambda: routes.get("nobodys.example.com") is None)
        statuses = await asyncio.gather(*(host.visit(domain) for domain in [*copies.values()] * 3))
        assert [status for status, _ in statuses] == [200] * 6
    for name in copies:
        environment.incus("delete", "--force", name)


async def test_a_clone_that_sleeps_since_an_earlier_version_is_woken(host: Hosting) -> None:
    name, domain = "slept", "slept.example.com"
    status, made, _ = await host.call("POST", f"/v1/tenants/{TENANT}/clone", {"tenant": name})
    assert status == 201, made
    await host.gateway.stop()
    environment.incus("stop", "--force", name)
    loosen(name)
    for key, value in (("domain", domain), ("asleep", "true"), ("idle_stop", "0")):
        environment.configure(name, f"user.gateway.{key}", value)
    (host.settings.state_dir / "caddy" / "routes" / domain).unlink(missing_ok=True)
    await host.gateway.start()
    await host.answers(domain)
    async with host.gateway.http(name) as http:
        assert (await get(http, name))["status"] == "running"
    environment.incus("delete", "--force", name)


def loosen(name: str) -> None:
    """Remove an instance's fixed address, as if it had been created without one."""
    running = environment.incus("list", name, "--format=csv", "--columns=s").stdout == b"RUNNING\n"
    if running:
        environment.incus("stop", "--force", name)
    environment.incus("config", "device", "remove", name, "eth0")
    environment.incus("config", "unset", name, "raw.lxc")
    if running:
        environment.incus("start", name)


async def sleeps(host: Hosting, name: str) -> None:
    async with host.gateway.http(name) as http:

        async def stopped() -> bool:  # it may sleep already, and then there is no event
            return bool((await get(http, name))["status"] == "stopped")

        await until(stopped, 60, every=0.2)


async def test_a_route_that_changes_is_never_no_route(incus_settings: Settings, tmp_path: Path) -> None:
    """Caddy looks up a route while it is being exchanged, hundreds of times a second."""
    settings = settings_for(incus_settings, tmp_path, listen="127.0.0.1:9", caddy_retry=0)
    process = RealCaddy(settings)
    await process.start()
    statuses: Counter[int] = Counter()
    changing = True

    async def visits(session: aiohttp.ClientSession) -> None:
        while changing:
            async with session.get("/") as answer:
                statuses[answer.status] += 1

    url = f"http://127.0.0.1:{settings.caddy_ask}"
    try:
        async with (
            Caddy(settings) as caddy,
            aiohttp.ClientSession(url, headers={"Host": "a.example.com"}) as session,
        ):
            caddy.set("a.example.com", "127.0.0.1:9")
            asking = [asyncio.create_task(visits(session)) for _ in range(3)]
            while statuses.total() < 1000:
                for target in ("127.0.0.2:9", "127.0.0.1:9"):
                    caddy.set("a.example.com", target)
                    await pause(0.001)
            changing = False
            await asyncio.gather(*asking)
    finally:
        await process.stop()
    assert statuses.keys() == {502}  # there is a route, but nothing answers
