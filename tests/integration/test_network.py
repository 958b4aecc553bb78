"""How visitors reach sites: every way from Caddy to a container, and what happens if one breaks.

Two gateways share one Incus here, each with a Caddy of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from gateway import protocol
from gateway.caddy import Caddy
from gateway.deployments.record import PHASES
from gateway.settings import Settings
from gateway_client import Client
from tests.contracts.gateway import no_traceback, sse
from tests.contracts.idle import told
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.live import Wire
from tests.waits import until

GATEWAY = "gateway.localhost"
DEADLINE = 60
COUNT = "i=0; until [ -e enough ]; do echo $((i += 1)); sleep 0.01; done"

# answers with the requested Host, also by websocket, like a dev server that reloads pages
SITE = """
Bun.serve({
  port: process.env.PORT, hostname: process.env.HOST,
  websocket: {open(ws) { ws.send(ws.data) }, message(ws, text) { ws.send(text) }},
  fetch(request, server) {
    const host = request.headers.get("host");
    const headers = {"Sec-WebSocket-Protocol": request.headers.get("sec-websocket-protocol") ?? ""};
    if (request.headers.has("upgrade") && server.upgrade(request, {data: host, headers})) return;
    return new Response(host);
  },
});
"""


@pytest.fixture(scope="module")
async def pair(
    incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Hosting, Hosting]]:
    """Two gateways on one Incus."""
    folder = tmp_path_factory.mktemp("network")
    template = folder / "templates" / "talk"
    template.mkdir(parents=True)
    (template / "site.toml").write_text('start = ["bun", "site.js"]\nport = 3000\n')
    (template / "site.js").write_text(SITE)
    changes: dict[str, Any] = {
        "templates_dir": template.parent,
        "reconcile_interval": 0.5,
    }
    quick = {
        "gateway.deployments.health.INTERVAL": 0.5,
        "gateway.deployments.health.FAILURES": 2,
        "gateway.deployments.health.TIMEOUT": 3.0,
    }
    async with (
        hosting(incus_settings, folder / "one", constants=quick, domain=GATEWAY, **changes) as one,
        hosting(incus_settings, folder / "two", constants=quick, **changes) as two,
    ):
        yield one, two
        for host in (one, two):
            await no_traceback(host.gateway)


@contextlib.asynccontextmanager
async def hot(host: Hosting, domain: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    """Yield a websocket to a site through Caddy, in a dev server's protocol."""
    url = f"http://127.0.0.1:{host.settings.caddy_http}/"
    headers = {"Host": f"{domain}:{host.settings.caddy_http}"}
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(url, headers=headers, protocols=("vite-hmr",)) as websocket,
    ):
        assert websocket.protocol == "vite-hmr"
        yield websocket


async def echoes(websocket: aiohttp.ClientWebSocketResponse) -> bool:
    """Return whether a site still answers on a websocket."""
    with contextlib.suppress(ConnectionError):
        await websocket.send_str("hot")
    said = await websocket.receive(timeout=DEADLINE)
    return said.data == "hot" if said.type is aiohttp.WSMsgType.TEXT else False


async def asked_by_websocket(host: Hosting, domain: str) -> str:
    """Return the Host that a site received from a websocket."""
    async with hot(host, domain) as websocket:
        said = await websocket.receive_str(timeout=DEADLINE)
        assert await echoes(websocket)
        return said


async def destroy(host: Hosting, domain: str) -> None:
    assert (await host.call("DELETE", f"/v1/tenants/{domain.replace('.', '-')}"))[0] == 204


async def answers(host: Hosting, domain: str) -> None:
    """Wait until a site answers through Caddy."""
    await host.answers(domain, 200, domain)


@pytest.fixture(scope="module")
async def site(pair: tuple[Hosting, Hosting]) -> str:
    """The domain of a permanent site of the first gateway."""
    record = await pair[0].deploy("stays.localhost", "talk")
    assert record["state"] == "succeeded", record["error"]
    return "stays.localhost"


async def test_gateways_that_deploy_at_once_each_serve_their_sites(
    pair: tuple[Hosting, Hosting], site: str
) -> None:
    one, two = pair
    hosts = {"a.localhost": one, "b.localhost": two}
    records = await asyncio.gather(*(host.deploy(domain, "talk") for domain, host in hosts.items()))
    assert [record["state"] for record in records] == ["succeeded"] * 2, [r["error"] for r in records]
    for domain, host in hosts.items():
        assert await host.visit(domain) == (200, domain)
        assert await asked_by_websocket(host, domain) == f"{domain}:{host.settings.caddy_http}"
    await asyncio.gather(*(destroy(host, domain) for domain, host in hosts.items()))


async def test_a_caddy_that_lost_everything_serves_again(pair: tuple[Hosting, Hosting], site: str) -> None:
    """It is killed and started without a configuration; then a route's file is removed."""
    host = pair[0]
    await host.caddy.stop()
    await host.caddy.start(instead="")
    await answers(host, site)
    (host.settings.state_dir / "caddy" / "routes" / site).unlink()
    assert (await host.visit(site))[0] in (200, 404)
    await answers(host, site)


BLOG = """
http://blog.localhost:{http} {{
	respond "a blog"
}}
"""
SITES = """
import {folder}/site.caddy
http://127.0.0.1:{ask} {{
	bind 127.0.0.1
	import site_ask
}}
http://:{ask} {{
	bind 127.0.0.1
	import site
}}
"""


async def test_an_operators_own_caddy_serves_the_sites_beside_its_own(
    pair: tuple[Hosting, Hosting], site: str
) -> None:
    """As in docs/operations.md; a deployment works there too, and what is not ours stays."""
    host = pair[0]
    folder = host.settings.state_dir / "caddy"
    where = {"folder": folder, "ask": host.settings.caddy_ask, "http": host.settings.caddy_http}
    blog = {"Host": f"blog.localhost:{where['http']}"}
    await host.caddy.stop()
    try:
        await host.caddy.start(instead=BLOG.format(**where))
        refused = await host.deploy("own.localhost", "talk")
        assert refused["error"]["reason"] == "caddy_foreign", refused
        await host.caddy.stop()
        await host.caddy.start(instead=(BLOG + SITES).format(**where))
        await answers(host, site)
        record = await host.deploy("own.localhost", "talk")
        assert record["state"] == "succeeded", record["error"]
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{where['http']}", headers=blog) as session,
            session.get("/") as answer,
        ):
            assert await answer.text() == "a blog"
        await destroy(host, "own.localhost")
    finally:
        await host.caddy.stop()
        await host.caddy.start()
    await answers(host, site)


async def test_a_configuration_that_caddy_refuses_changes_nothing(
    pair: tuple[Hosting, Hosting], site: str
) -> None:
    """A deployment says so and is undone, other sites are still served, and the old files stay."""
    host = pair[0]
    folder = host.settings.state_dir / "caddy"
    before = host.leavings(), (folder / "Caddyfile").read_text()
    await host.gateway.stop()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        host.gateway.environment["GATEWAY_CADDY_HTTP"] = str(stranger.getsockname()[1])
        await host.gateway.start()
        record = await host.deploy("refused.localhost", "talk")
        assert (record["state"], record["error"]["reason"]) == ("rolledback", "caddy_refused"), record
        assert await host.visit(site) == (200, site)
        await host.gateway.stop()
    host.gateway.environment["GATEWAY_CADDY_HTTP"] = str(host.settings.caddy_http)
    await host.gateway.start()
    assert (host.leavings(), (folder / "Caddyfile").read_text()) == before


async def test_streams_of_the_gateway_behind_caddy_outlive_changes_of_routes(
    pair: tuple[Hosting, Hosting], site: str
) -> None:
    """A command's output by websocket, an event stream and a site's own websocket, while another site comes,
    is updated, and goes.
    """
    host, tenant = pair[0], site.replace(".", "-")
    port = host.settings.caddy_http
    async with Caddy(host.settings) as caddy:
        await caddy.ensure()  # the gateway has just started and may not have done this yet
    headers = {"Host": f"{GATEWAY}:{port}", "Authorization": f"Bearer {host.gateway.token('*')}"}
    async with (
        aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as session,
        session.get("/v1/events?type=deployment.phase.finished") as events,
        hot(host, site) as reloads,
        connect(
            f"ws://{GATEWAY}:{port}/v1/tenants/{tenant}/ws",
            subprotocols=[Subprotocol(protocol.SUBPROTOCOL)],
            proxy=None,
            host="127.0.0.1",
            port=port,
        ) as websocket,
    ):
        wire = Wire(websocket)
        token = host.gateway.token(tenant)
        await wire.call("initialize", client={"name": "test", "version": "1"}, token=token)
        started = await wire.call("exec/start", command=COUNT)
        out = wire.output[started["channel"], 1]
        assert await reloads.receive_str(timeout=DEADLINE)
        for kind in ("create", "update"):
            record = await host.deploy("comes.localhost", "talk")
            assert (record["state"], record["kind"]) == ("succeeded", kind), record["error"]
        await destroy(host, "comes.localhost")
        await host.answers("comes.localhost", 404)
        seen = len(out)
        await wire.until(lambda: len(out) > seen)
        await wire.call("exec/start", command="touch enough")
        assert (await wire.exited(started["exec"]))["exitCode"] == 0
        removing = await wire.call("exec/start", command="rm enough")
        await wire.exited(removing["exec"])
        lines = bytes(out).split()
        assert lines == [b"%d" % (number + 1) for number in range(len(lines))]
        told = [event["data"]["data"]["phase"] for event in await sse(events, 2 * len(PHASES))]
        assert told == [*PHASES] * 2
        assert await echoes(reloads)
        await wire.close()


async def test_what_a_new_configuration_cuts_goes_on_without_loss(
    pair: tuple[Hosting, Hosting], site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caddy gets another configuration, and the right one again from the gateway, during a client's command.

    Caddy before 2.7 cuts websockets at once, later versions do not; none cuts event streams.
    """
    host, tenant, port = pair[0], site.replace(".", "-"), pair[0].settings.caddy_http
    look_up = socket.getaddrinfo
    monkeypatch.setattr(  # like browsers for *.localhost
        socket, "getaddrinfo", lambda name, *rest, **more: look_up("127.0.0.1", *rest, **more)
    )
    url, token = f"http://{GATEWAY}:{port}", host.gateway.token("*")
    right = Caddy(host.settings)
    other = Caddy(host.settings.model_copy(update={"caddy_retry": host.settings.caddy_retry + 1}))
    is_right = lambda: right.folder.joinpath("site.caddy").read_text() == right.rendered()["site.caddy"]  # noqa: E731
    told: list[str] = []
    async with (
        asyncio.timeout(DEADLINE),
        other,
        aiohttp.ClientSession(url, headers={"Authorization": f"Bearer {token}"}) as session,
        session.get("/v1/events?type=exec.exited") as events,
        hot(host, site) as reloads,
        Client(url, token=token, on_change=lambda change: told.append(change.state)) as client,
        client.tenant(tenant).exec(COUNT) as run,
    ):
        assert await reloads.receive_str()
        out = b"" + await anext(run.stdout)
        for _ in range(2):
            assert await other.ensure()
            await until(is_right)
            out += await anext(run.stdout)
        environment.incus("exec", tenant, "--", "touch", "/srv/site/enough")
        out += b"".join([chunk async for chunk in run.stdout])
        assert ((await run.wait()).code, run.stdout.lost) == (0, 0)
        cut = not await echoes(reloads)
        assert (await sse(events, 1))[0]["event"] == "exec.exited"
    environment.incus("exec", tenant, "--", "rm", "/srv/site/enough")
    numbers = out.split()
    assert numbers == [b"%d" % (number + 1) for number in range(len(numbers))]
    version = subprocess.run(["caddy", "version"], check=True, capture_output=True, text=True).stdout
    assert cut == ([int(part) for part in version.split()[0].removeprefix("v").split(".")] < [2, 7])
    assert ("reconnecting" in told) == cut


async def hears(events: aiohttp.ClientResponse, kind: str, *facts: str) -> dict[str, Any]:
    """Return the data of the next event of that type with these facts."""
    while True:
        (said,) = await sse(events, 1)
        data: dict[str, Any] = said["data"]["data"]
        if said["event"] == kind and data.keys() >= {*facts}:
            return data


async def test_who_watches_hears_when_a_site_stops_answering_and_when_it_does_again(
    pair: tuple[Hosting, Hosting], site: str
) -> None:
    """Its server ends and comes back, hangs and continues; then its tenant is restarted, and the port is soon
    open again.
    """
    host, tenant = pair[0], site.replace(".", "-")
    async with host.gateway.http("*") as session, told(host.gateway, tenant, "tenant.*") as events:
        environment.incus("exec", tenant, "--", "systemctl", "stop", "site.service")
        said = await hears(events, "tenant.unhealthy", "failures")
        assert (said["port"], said["path"]) == (3000, "/")
        environment.incus("exec", tenant, "--", "systemctl", "start", "site.service")
        assert (await hears(events, "tenant.healthy"))["port"] == 3000
        for number, kind in (("STOP", "tenant.unhealthy"), ("CONT", "tenant.healthy")):
            environment.incus("exec", tenant, "--", "systemctl", "kill", f"--signal={number}", "site.service")
            said = await hears(events, kind)
            # our look has no answer, or the other gateway's, which is a visitor here, is not read first
            assert number == "CONT" or said["why"] in ("no answer in 3 s", "it has read no request for 3 s")
        begun = time.monotonic()
        async with session.post(f"/v1/tenants/{tenant}/restart") as answer:
            assert answer.status == 200
        took = time.monotonic() - begun
        said = await hears(events, "tenant.healthy", "ms")
        assert said["port"] == 3000
    print(f"restart {took:.2f} s, and the site answered {said['ms']} ms after its start")
    await answers(host, site)
    assert took < 20  # 2 s where little else runs
