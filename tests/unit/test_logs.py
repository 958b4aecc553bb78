"""No token is in the log, at the level debug: every way to give one, good, bad and broken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from gateway import protocol
from gateway.auth import tokens
from tests.contracts.gateway import no_traceback
from tests.contracts.mcp import HANDSHAKE, SESSIONLESS, mcp
from tests.live import SECRET, LiveGateway, local_gateway


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LiveGateway]:
    gateway = await local_gateway(tmp_path, "demo")
    gateway.serve = ("serve", "--log-level", "debug")
    await gateway.start()
    yield gateway
    if gateway.process is not None and gateway.process.returncode is None:
        await gateway.stop()


def every_token(gateway: LiveGateway) -> dict[str, str]:
    good = gateway.token("demo")
    head, body, signature = good.split(".")
    return {
        "good": good,
        "of another secret": tokens.issue(SECRET[::-1], "test", ["demo"], ["exec"], 60),
        "ended": tokens.issue(SECRET, "test", ["demo"], ["exec"], 1),
        "of another tenant": gateway.token("t-other"),
        "cut": good[:-3],
        "not base64": f"{head}.{body[:-1]}!.{signature}",
        "with a control character": f"{head}.{body}\x7f.{signature}",
    }


async def asked(gateway: LiveGateway, raw: str) -> None:
    """Ask by every way that takes a token; what is answered is other tests' business."""
    address = f"http://127.0.0.1:{gateway.port}"
    paths = ("/v1/tenants", "/v1/tenants/demo", "/v1/tenants/demo/metrics", "/v1/audit", "/none")
    for headers in ({"Authorization": f"Bearer {raw}"}, {"Cookie": f"gateway_session={raw}"}):
        async with aiohttp.ClientSession(address, headers=headers) as http:
            for path in paths:
                with contextlib.suppress(aiohttp.ClientError, ValueError):
                    await (await http.get(path)).read()
            posts: list[tuple[str, Any]] = [
                ("/v1/tenants/demo/exec", {"command": ["true"]}),
                ("/v1/tenants/demo/tools/Read", {"file_path": "none"}),
                ("/v1/deployments", {"domain": "a.localhost", "template": "no such"}),
                ("/v1/tenants/demo/mcp", {"jsonrpc": "2.0", "id": 1, "method": "none"}),
                ("/v1/session", {"token": raw}),
                ("/v1/session", {"token": raw, "slot": raw}),
                ("/v1/revocations", {"id": raw}),
            ]
            for path, body in posts:
                with contextlib.suppress(aiohttp.ClientError, ValueError):
                    await (await http.post(path, json=body)).read()
            with contextlib.suppress(
                aiohttp.ClientError, ValueError
            ):  # a body that is no JSON, with a token in it
                await (await http.post("/v1/session", data=f"{{{raw}")).read()
            with contextlib.suppress(aiohttp.ClientError, ValueError, TimeoutError):
                async with asyncio.timeout(5):
                    async with http.get("/v1/events") as events:
                        await events.content.readline()
    for given in ({"Authorization": f"Bearer {raw}"}, {}):
        said: list[tuple[str, dict[str, Any]]] = [
            ("initialize", {"client": {"name": "t", "version": "1"}, "token": raw}),
            ("session/renew", {"token": raw}),
            ("initialize", {"client": raw, "token": [raw]}),
        ]
        with contextlib.suppress(WebSocketException, ValueError, OSError):
            address = f"ws://127.0.0.1:{gateway.port}/v1/tenants/demo/ws"
            protocols: Any = [protocol.SUBPROTOCOL]
            async with connect(address, subprotocols=protocols, additional_headers=given, proxy=None) as wire:
                for number, (method, params) in enumerate(said):
                    await wire.send(protocol.request(number, method, params))
                    await wire.recv()
                await wire.send(f'{{"jsonrpc": "2.0", "method": "initialize", "params": "{raw}"')
                await wire.recv()
    # what no HTTP library would send: h11 and uvicorn refuse it
    for request in (
        f"GET /v1/tenants HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {raw}\r\n broken\r\n\r\n",
        f"GET /v1/tenants HTTP/1.1\r\nHost: x\r\nAuthorization Bearer {raw}\r\n\r\n",
        f"POST /v1/session HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n{raw}",
        f"GET /v1/tenants/demo/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {raw}\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: no\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        with contextlib.suppress(OSError, TimeoutError):
            writer.write(request.encode())
            await writer.drain()
            async with asyncio.timeout(0.2):
                await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def test_no_token_is_in_the_log(gateway: LiveGateway) -> None:
    tokens = every_token(gateway)
    for raw in tokens.values():
        await asked(gateway, raw)
    for version in (HANDSHAKE, SESSIONLESS):
        async with mcp(gateway, "demo", version) as client:
            await client.list_tools()
    assert await gateway.stop() == 0
    said = gateway.log.read_text()
    assert "DEBUG" in said and len(said) > 1000  # it is logged at that level
    for signature in gateway.signatures:
        assert signature not in said
    for what, raw in tokens.items():
        # each part too: the signature is what makes a token, the middle part says whose it is
        for part in (raw, *(part for part in raw.split(".")[1:] if len(part) > 10)):
            assert part not in said, what
    assert SECRET not in said
    await no_traceback(gateway)
