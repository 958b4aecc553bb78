"""The client over HTTP: requests, problems, and the event stream, also against the real SSE response."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.events import Bus, Filter, MemoryJournal, sse
from gateway.settings import Settings
from gateway_client import Client, Disconnected, Event, RunResult, errors
from gateway_client.events import MAX_EVENT, Parser, ServerSent
from gateway_client.retry import Retry

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(handler: Handler, retry: Retry | None = None) -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    async with asyncio.timeout(30), TestServer(app) as server:
        async with Client(str(server.make_url("/")), token="t0ken", retry=retry) as client:
            yield client


async def test_run_sends_the_command_and_returns_its_output() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert (request.method, request.path) == ("POST", "/v1/tenants/shop/exec")
        assert request.headers["Authorization"] == "Bearer t0ken"
        body = await request.json()
        assert body == {"argv": ["cat"], "cwd": "/tmp", "env": {"A": "b"}, "stdin": "x", "timeout_ms": 2500}
        answer = {"exec": "e1", "exit_code": 0, "signal": None, "reason": "exited", "stdout": "x"}
        return web.json_response(answer | {"stderr": "", "truncated": False, "duration_ms": 7})

    async with serving(handler) as client:
        ran = await client.tenant("shop").run(["cat"], cwd="/tmp", env={"A": "b"}, stdin="x", timeout=2.5)
    assert ran == RunResult("e1", 0, None, "x", "", False, 7, "exited")


async def test_a_large_input_is_sent_whole() -> None:
    async def handler(request: web.Request) -> web.Response:
        body = json.loads(await request.content.read())
        answer = {"exec": "e1", "exit_code": 0, "signal": None, "stdout": str(len(body["stdin"]))}
        return web.json_response(answer | {"stderr": "", "truncated": False, "duration_ms": 7})

    async with serving(handler) as client:
        assert (await client.tenant("shop").run("wc", stdin="x" * 3_000_000)).stdout == "3000000"


async def test_tenants_are_listed_and_moved_through_their_life() -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(f"{request.method} {request.path}")
        if request.method == "DELETE":
            return web.Response(status=204)
        entry = {"name": "shop", "status": "running", "address": "10.0.0.2", "location": "a"}
        return web.json_response({"tenants": [entry]} if request.path == "/v1/tenants" else entry)

    async with serving(handler) as client:
        (info,) = await client.tenants()
        assert (info.name, info.status, info.domain, info.address) == ("shop", "running", None, "10.0.0.2")
        assert info.all["location"] == "a"
        shop = client.tenant("shop")
        assert shop is client.tenant("shop")
        assert (await shop.info())["status"] == "running"
        for action in (shop.start, shop.stop, shop.restart, shop.delete):
            await action()
    path = "/v1/tenants/shop"
    life = [f"POST {path}/start", f"POST {path}/stop", f"POST {path}/restart", f"DELETE {path}"]
    assert asked == ["GET /v1/tenants", f"GET {path}", *life]


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (
            409,
            '{"code": "tenant_not_running", "detail": "start it", "title": "t"}',
            errors.TenantNotRunning,
            "start it",
        ),
        (404, '{"code": "not_found", "title": "no tenant"}', errors.NotFound, "no tenant"),
        (401, "<html>", errors.Unauthorized, "HTTP 401"),
        (502, "Bad gateway", errors.Unavailable, "HTTP 502"),
        (500, "[]", errors.Unavailable, "HTTP 500"),
        (200, "not json", Disconnected, "JSON"),
    ],
)
async def test_a_problem_is_the_typed_error(
    status: int, body: str, kind: type[errors.GatewayError], message: str
) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    async with serving(handler) as client:
        with pytest.raises(kind, match=message) as caught:
            await client.tenant("shop").info()
        assert type(caught.value) is kind


async def test_a_closed_client_says_so() -> None:
    client = Client("http://127.0.0.1:9", token="t")
    await client.close()
    await client.close()
    with pytest.raises(Disconnected):
        await client.tenants()


# --- events ------------------------------------------------------------------------------------------


def test_the_parser_reads_what_the_standard_allows() -> None:
    text = (
        b"\xef\xbb\xbf: byte order mark and a comment\n"
        b"id: 7\nevent: a.b\ndata: one\ndata:two\ndata:  three\n\n"
        b"data\n\n"
        b"event: nothing\n\n"
        b"retry: 5\r\ndata: crlf\r\n\r\n"
        b"data: cr\r\r"
        b"id: 8\ndata: \xc3\xbc\n\n"
    )
    wanted = [
        ServerSent("a.b", "one\ntwo\n three", "7"),
        ServerSent("message", "", "7"),
        ServerSent("message", "crlf", "7"),
        ServerSent("message", "cr", "7"),
        ServerSent("message", "ü", "8"),
    ]
    for size in (1, 2, 3, 7, len(text)):
        parser = Parser()
        got = [
            sent for start in range(0, len(text), size) for sent in parser.feed(text[start : start + size])
        ]
        assert got == wanted, f"in chunks of {size}"


def test_the_parser_is_bounded() -> None:
    parser = Parser()
    with pytest.raises(errors.TooLarge):
        for _ in range(MAX_EVENT // 1_000_000 + 2):
            parser.feed(b"data: " + b"x" * 1_000_000 + b"\n")
    with pytest.raises(errors.TooLarge):
        Parser().feed(b"x" * (MAX_EVENT + 1))


async def test_events_are_asked_for_with_filter_and_last_id() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.path == "/v1/events"
        assert dict(request.query) == {"tenant": "shop,blog", "type": "exec.*"}
        assert request.headers["Last-Event-ID"] == "5"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        body = {"specversion": "1.0", "id": "6", "source": "/gateway/g", "type": "exec.started"}
        body |= {"subject": "shop", "time": "2026-11-25T00:00:00.000Z", "data": {"exec": "e"}}  # type: ignore[dict-item]
        await response.write(f": hi\n\nid: 6\nevent: exec.started\ndata: {json.dumps(body)}\n\n".encode())
        return response

    async with serving(handler) as client:
        async with client.events(tenant=["shop", "blog"], types="exec.*", last_event_id=5) as stream:
            got = [event async for event in stream]
        assert stream.last_event_id == "6"
    time = "2026-11-25T00:00:00.000Z"
    assert got == [Event(6, "exec.started", "shop", time, "/gateway/g", {"exec": "e"})]


async def test_a_stream_that_breaks_is_not_an_end() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b": hi\n\n")
        assert request.transport is not None
        request.transport.abort()
        return response

    async with serving(handler) as client:
        with pytest.raises(Disconnected):
            async for _ in client.events():
                pytest.fail("there was none")


def _sent(number: int) -> bytes:
    body = {"specversion": "1.0", "id": str(number), "source": "/g", "type": "t", "data": {}}
    return f"id: {number}\nevent: t\ndata: {json.dumps(body)}\n\n".encode()


async def test_a_stream_comes_back_where_it_was_and_misses_nothing() -> None:
    """After a break, after an end, before its first event; at last it says that nobody answers."""
    asked: list[str | None] = []
    answers = iter([b"id: 4\n\n", _sent(5) + _sent(6) + b"id: 7\nda", None, _sent(7)])

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Last-Event-ID"))
        response = web.StreamResponse()
        answer = next(answers, None)
        if answer is None:
            return web.json_response({"code": "unavailable"}, status=503)
        await response.prepare(request)
        await response.write(answer)
        assert request.transport is not None
        if len(asked) == 2:
            request.transport.abort()
        return response

    async with serving(handler, Retry(first=0.01, most=0.02, patience=0.2)) as client:
        stream, got = client.events(), []
        with pytest.raises(errors.Unavailable):
            while True:
                got.append((await anext(stream)).id)
    assert got == [5, 6, 7]
    assert asked[:4] == [None, "4", "6", "6"]
    assert set(asked[4:]) == {"7"}


async def test_an_id_over_several_members_is_sent_back_as_it_came() -> None:
    asked: list[str | None] = []
    answers = iter([b"id: m1:17,m2:4\n\n", b"id: m1:17,m2:5\n" + _sent(5).partition(b"\n")[2], b""])

    async def handler(request: web.Request) -> web.StreamResponse:
        asked.append(request.headers.get("Last-Event-ID"))
        response = web.StreamResponse()
        answer = next(answers, None)
        if answer is None:
            return web.json_response({"code": "forbidden"}, status=403)
        await response.prepare(request)
        await response.write(answer)
        return response

    async with serving(handler, Retry(first=0.01, most=0.02, patience=5)) as client:
        stream = client.events()
        assert ((await anext(stream)).id, stream.last_event_id) == (5, "m1:17,m2:5")
        with pytest.raises(errors.Forbidden):
            await anext(stream)
    assert asked == [None, "m1:17,m2:4", "m1:17,m2:5", "m1:17,m2:5"]


async def test_a_refused_stream_is_the_typed_error() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"code": "forbidden", "detail": "no events for you"}, status=403)

    async with serving(handler) as client:
        with pytest.raises(errors.Forbidden, match="no events"):
            async for _ in client.events():
                pytest.fail("there was none")


async def test_the_gateways_own_stream_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parser against real response: what is published between entering and reading arrives."""
    bus = Bus(MemoryJournal(3, first=10), "t")
    monkeypatch.setattr(sse, "KEEPALIVE", 0.02)
    app = sse.response(bus, Filter(), 3, Settings(state_dir=Path("/nonexistent")))

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                await response.prepare(request)
            else:
                await response.write(message["body"])

        async def receive() -> Any:
            await asyncio.Event().wait()

        await app({"type": "http", "method": "GET"}, receive, send)
        return response

    async with serving(handler) as client:
        async with client.events() as stream:
            published = bus.publish("exec.started", "shop", {"text": "a\r\nb ü"}, deployment="d1")
            gap, got = await anext(stream), await anext(stream)
            bus.close()
            assert [event async for event in stream] == []
    assert (gap.type, gap.data, gap.tenant) == ("gap", {"oldest": 10}, None)
    assert (got.id, got.tenant, got.data) == (published.id, "shop", dict(published.data))
