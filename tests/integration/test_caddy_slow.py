"""A real Caddy with our configuration waits for no head for long, and cuts nothing that has begun."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from gateway.caddy import Caddy
from gateway.rootfs import connections
from tests.constants import constants
from tests.integration import environment
from tests.integration.sites import RealCaddy, settings_for
from tests.live import LiveGateway, free_ports, local_gateway
from tests.waits import pause, until

SITE, GATEWAY = "site.localhost", "gateway.localhost"
HEAD = 2  # seconds that a head may take here, as 10 elsewhere
LONGER = 3.5  # seconds; longer than a head may take


@pytest.fixture(scope="module")
async def caddy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealCaddy]:
    """A Caddy before a site that counts what it is sent, talks slowly, and echoes over a websocket."""

    async def take(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    async def talk(request: web.Request) -> web.StreamResponse:
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: first\n\n")
        await pause(LONGER)
        await answer.write(b"data: last\n\n")
        return answer

    async def echo(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            await socket.send_str(message.data)
        return socket

    app = web.Application()
    app.add_routes([web.post("/", take), web.get("/talk", talk), web.get("/echo", echo)])
    runner = web.AppRunner(app)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    caddy = RealCaddy(settings_for(environment.settings(), tmp_path_factory.mktemp("state")))
    async with Caddy(caddy.settings) as routes:
        routes.set(SITE, f"127.0.0.1:{runner.addresses[0][1]}")
        await caddy.start(head=HEAD)
        yield caddy
        await caddy.stop()
    await runner.cleanup()


async def lasts(port: int, said: bytes, more: bytes = b"") -> float:
    """Return after how many seconds the peer hangs up on who says `said`, and `more` every half second."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()
    writer.write(said)

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while more:
                await pause(0.5)
                writer.write(more)
                await writer.drain()

    dripping = asyncio.create_task(drip())
    try:
        async with asyncio.timeout(40):
            with contextlib.suppress(ConnectionError):
                while await reader.read(1 << 16):
                    pass
        return time.monotonic() - began
    finally:
        dripping.cancel()
        writer.close()


async def test_head_that_does_not_come_in_time_is_given_up(caddy: RealCaddy) -> None:
    """In plain HTTP and before TLS, with nothing said or a byte now and then."""
    http, https = caddy.settings.caddy_http, caddy.settings.caddy_https
    head = f"GET / HTTP/1.1\r\nHost: {SITE}\r\nX-Slow: ".encode()
    times = await asyncio.gather(
        lasts(http, head), lasts(http, head, b"x"), lasts(http, b""), lasts(https, b"")
    )
    assert all(HEAD - 0.5 < seconds < 20 for seconds in times), times


async def test_what_has_begun_is_not_cut(caddy: RealCaddy) -> None:
    """An upload, an event stream and a websocket that take longer than a head may."""
    port = caddy.settings.caddy_http

    async def slowly() -> AsyncIterator[bytes]:
        for _ in range(27):
            yield b"x" * 1000
            await pause(LONGER / 26)

    async with aiohttp.ClientSession(
        f"http://127.0.0.1:{port}", headers={"Host": f"{SITE}:{port}"}
    ) as client:

        async def upload() -> str:
            async with client.post("/", data=slowly()) as answer:
                return await answer.text()

        async def stream() -> str:
            async with client.get("/talk") as answer:
                return await answer.text()

        async def echoed() -> str:
            async with client.ws_connect("/echo") as opened:
                await pause(LONGER)
                await opened.send_str("still")
                return str((await opened.receive()).data)

        said = tuple(await asyncio.gather(upload(), stream(), echoed()))
    assert said == ("27000", "data: first\n\ndata: last\n\n", "still")


async def test_whom_the_gateway_cuts_off_from_a_site_that_hangs_is_told_to_come_again(
    caddy: RealCaddy,
) -> None:
    """Also before it is noted that the site hangs. A site that breaks a request off itself is a bad one."""
    domain, port = "hangs.localhost", caddy.settings.caddy_http

    async def visit(client: aiohttp.ClientSession) -> tuple[int, str | None]:
        async with client.get("/", headers={"Host": f"{domain}:{port}", "Accept": "text/html"}) as answer:
            assert "Back in a moment" in await answer.text()
            return answer.status, answer.headers.get("Retry-After")

    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()
        hanging.setblocking(False)
        there = hanging.getsockname()[1]
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
            Caddy(caddy.settings) as routes,
            asyncio.timeout(60),
        ):
            routes.set(domain, f"127.0.0.1:{there}")
            visiting = asyncio.ensure_future(visit(client))
            await until(lambda: connections.break_off(os.getpid(), "127.0.0.1", there, ()) == 1)
            assert await visiting == (503, "5")

            loop = asyncio.get_running_loop()
            (await loop.sock_accept(hanging))[0].close()  # what is left of that
            visiting = asyncio.ensure_future(visit(client))
            taken, _ = await loop.sock_accept(hanging)
            with taken:
                await loop.sock_recv(taken, 1)
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            assert await visiting == (502, "5")


async def test_who_comes_while_a_server_is_started_again_waits_for_it(caddy: RealCaddy) -> None:
    """Who sends something is told at once, and the wait for a server that stays away has an end."""
    port, domain = caddy.settings.caddy_http, "restarting.localhost"

    async def visit(client: aiohttp.ClientSession, method: str) -> tuple[int, float]:
        began = time.monotonic()
        async with client.request(method, "/", headers={"Host": f"{domain}:{port}"}) as answer:
            await answer.read()
            return answer.status, time.monotonic() - began

    async def back(request: web.Request) -> web.Response:
        return web.Response(text="back")

    app = web.Application()
    app.add_routes([web.get("/", back)])
    runner = web.AppRunner(app)
    await runner.setup()
    (there,) = free_ports(1)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client, Caddy(caddy.settings) as routes:
        routes.set(domain, f"127.0.0.1:{there}")
        status, seconds = await visit(client, "GET")
        assert status == 502 and caddy.settings.caddy_retry <= seconds < 10
        visiting = asyncio.ensure_future(visit(client, "GET"))
        status, seconds = await visit(client, "POST")
        assert status == 502 and seconds < caddy.settings.caddy_retry
        await web.TCPSite(runner, "127.0.0.1", there).start()
        assert (await visiting)[0] == 200
    await runner.cleanup()


async def test_a_site_that_leaves_a_body_unread_is_asked_by_another_connection(caddy: RealCaddy) -> None:
    """It hears nothing that is said after that body, and closes the connection later, as SvelteKit's does."""
    port, domain = caddy.settings.caddy_http, "unread.localhost"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                if b"Connection: close" in head:  # a body that is unread at the end takes the answer with it
                    writer.transport.abort()
                    return
                writer.write(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
                if head.startswith(b"POST"):
                    await pause(1.0)
                    break
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with (
        server,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client,
        Caddy(caddy.settings) as routes,
    ):
        routes.set(domain, f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        for method in ("POST", "GET", "POST", "POST"):
            began = time.monotonic()
            async with client.request(
                method,
                "/",
                headers={"Host": f"{domain}:{port}"},
                data=b"x" * 50_000 if method == "POST" else None,
            ) as said:
                assert (said.status, time.monotonic() - began < 0.9) == (405, True), method


async def test_strangers_are_told_apart_behind_caddy(caddy: RealCaddy, tmp_path: Path) -> None:
    """A gateway that Caddy leads to knows who asks by Caddy's word, and by nobody else's."""
    few = constants({"gateway.limits.budget.ANONYMOUS_PER_ADDRESS": 2})
    gateway: LiveGateway = await local_gateway(tmp_path, "a", GATEWAY_DOMAIN=GATEWAY, **few)
    await gateway.start()
    try:
        async with Caddy(caddy.settings) as routes:
            routes.set(GATEWAY, f"127.0.0.1:{gateway.port}")
        port = caddy.settings.caddy_http
        async with contextlib.AsyncExitStack() as stack:
            client = await stack.enter_async_context(
                aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers={"Host": f"{GATEWAY}:{port}"})
            )
            for number in range(2):
                forged = {"X-Forwarded-For": f"10.0.0.{number}"}
                await stack.enter_async_context(client.ws_connect("/v1/tenants/a/ws", headers=forged))
            third = await stack.enter_async_context(
                client.ws_connect("/v1/tenants/a/ws", headers={"X-Forwarded-For": "10.0.0.9"})
            )
            async with asyncio.timeout(30):
                await third.receive()
            assert third.close_code == 4429
    finally:
        await gateway.stop()
