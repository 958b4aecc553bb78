"""What browsers are told of pages of other origins: their requests end here, before any route."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from starlette.datastructures import Headers
from starlette.types import Message

from gateway.api.app import Gateway
from gateway.settings import Settings

LISTED = "https://app.example.com"


async def answered(folder: Path, origins: tuple[str, ...], origin: str, method: str, **more: str) -> Headers:
    app = Gateway(Settings(state_dir=folder, origins=origins)).app
    said: list[Message] = []

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        said.append(message)

    given = {"host": "127.0.0.1", "origin": origin, **more}
    scope = {
        "type": "http",
        "method": method,
        "scheme": "http",
        "path": "/no/such/path",
        "query_string": b"",
        "client": ("127.0.0.1", 1),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    async with asyncio.timeout(10):
        await app(scope, receive, send)
    return Headers(raw=said[0]["headers"])


async def preflight(folder: Path, origins: tuple[str, ...], origin: str = LISTED) -> Headers:
    asks = {
        "access-control-request-method": "PUT",
        "access-control-request-headers": "authorization,content-type,if-match",
    }
    return await answered(folder, origins, origin, "OPTIONS", **asks)


async def test_a_page_of_a_listed_origin_may_ask_and_read(tmp_path: Path) -> None:
    """With a token, not by the cookie; in whatever spelling the origin is listed."""
    for origins in ((LISTED,), ("https://other.example.com", "HTTPS://App.example.com:443")):
        said = await preflight(tmp_path, origins)
        assert said["access-control-allow-origin"] == LISTED
        assert "PUT" in said["access-control-allow-methods"]
        allowed = said["access-control-allow-headers"].lower().split(", ")
        assert {"authorization", "content-type", "if-match", "idempotency-key", "last-event-id"} <= {*allowed}
        assert "access-control-allow-credentials" not in said
        said = await answered(tmp_path, origins, LISTED, "GET")
        assert said["access-control-allow-origin"] == LISTED and said["vary"] == "Origin"
        assert "ETag" in said["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in said


@pytest.mark.parametrize("origins", [(), ("*",), ("https://example.com",), ("http://app.example.com",)])
async def test_a_page_of_no_listed_origin_may_not(tmp_path: Path, origins: tuple[str, ...]) -> None:
    for said in (await preflight(tmp_path, origins), await answered(tmp_path, origins, LISTED, "GET")):
        assert "access-control-allow-origin" not in said


async def test_a_page_without_an_origin_may_not(tmp_path: Path) -> None:
    said = await preflight(tmp_path, (LISTED, "null"), "null")
    assert "access-control-allow-origin" not in said
