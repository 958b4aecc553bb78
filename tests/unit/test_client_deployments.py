"""Deployments by the client: what is sent, the events from the first to the last, the typed end."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway_client import Client, deployments, errors
from gateway_client.retry import Retry

Told = tuple[int, str, dict[str, Any]]

GAP: Told = (9, "gap", {"oldest": 10})
STARTED: Told = (11, "deployment.started", {"deployment": "d-1"})
FINISHED: Told = (12, "deployment.phase.finished", {"deployment": "d-1", "phase": "validate"})
SUCCEEDED: Told = (13, "deployment.succeeded", {"deployment": "d-1"})


def record(state: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
    phases = [{"name": "validate", "state": "done", "ms": 3}]
    names = {"id": "d-1", "tenant": "shop-example", "domain": "shop.example", "url": "http://shop.example"}
    return {**names, "kind": "create", "state": state, "phases": phases, "ms": 5, "error": error}


def sent(told: Told) -> bytes:
    number, kind, data = told
    body = {"specversion": "1.0", "id": str(number), "source": "/g", "type": kind, "data": data}
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(body)}\n\n".encode()


class Gateway:
    """Answers with these records in turn, the last for good, and with these streams of events."""

    def __init__(self, records: Sequence[dict[str, Any]], *streams: Sequence[Told]) -> None:
        self.records, self.streams = list(records), list(streams)
        self.asked: list[tuple[str, Any]] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((f"{request.method} {request.path}", body))
        if request.path != "/v1/events":
            status = 202 if request.method == "POST" else 200
            return web.json_response(
                self.records.pop(0) if len(self.records) > 1 else self.records[0], status=status
            )
        assert dict(request.query) == {"deployment": "d-1", "type": "deployment.*"}
        self.asked[-1] = ("GET /v1/events", request.headers["Last-Event-ID"])
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"".join(map(sent, self.streams.pop(0))))
        if not self.streams:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 20)
        return response


@contextlib.asynccontextmanager
async def serving(gateway: Gateway) -> AsyncIterator[Client]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", gateway.answer)
    retry = Retry(first=0.01, most=0.02, patience=5)
    server = TestServer(app)
    async with asyncio.timeout(30):
        await server.start_server(shutdown_timeout=0.1)
        try:
            async with Client(str(server.make_url("/")), token="t0ken", retry=retry) as client:
                yield client
        finally:
            await server.close()


async def test_a_name_a_folder_and_a_tar_are_sent_as_the_gateway_takes_them(tmp_path: Path) -> None:
    for path in ("site.toml", "src/a.ts", "node_modules/x/y.js", ".git/HEAD"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    gateway = Gateway([{"id": "d-1"}])
    async with serving(gateway) as client:
        begun = await client.deploy("shop.example", "static", size="medium", env={"A": "b"}, tenant="shop")
        assert begun.id == "d-1"
        await client.deploy("shop.example", b"tar")
        await client.deploy("shop.example", tmp_path, key="once")
    bodies = [body for _, body in gateway.asked]
    named = {"domain": "shop.example", "template": "static", "size": "medium", "tenant": "shop"}
    assert bodies[0] == {**named, "env": {"A": "b"}}
    assert bodies[1] == {"domain": "shop.example", "template": {"archive": base64.b64encode(b"tar").decode()}}
    archive = io.BytesIO(base64.b64decode(bodies[2]["template"]["archive"]))
    with tarfile.open(fileobj=archive) as packed:
        assert [entry.name for entry in packed if entry.isfile()] == ["site.toml", "src/a.ts"]


async def test_events_come_from_the_first_to_the_last_whenever_they_are_asked_for() -> None:
    """The `gap` that stands for what was before the deployment is none of its own."""
    gateway = Gateway([record("running")], [GAP, STARTED, FINISHED, SUCCEEDED])
    async with serving(gateway) as client:
        got = [event.type async for event in client.deployment("d-1").events()]
    assert got == [told[1] for told in (STARTED, FINISHED, SUCCEEDED)]
    assert ("GET /v1/events", "0") in gateway.asked


async def test_events_go_on_after_a_break_and_say_what_is_missing() -> None:
    gateway = Gateway([record("running")], [GAP, STARTED], [GAP, SUCCEEDED])
    async with serving(gateway) as client:
        got = [event.type async for event in client.deployment("d-1").events()]
    assert got == ["deployment.started", "gap", "deployment.succeeded"]
    assert [said for name, said in gateway.asked if name == "GET /v1/events"] == ["0", "11"]


async def test_of_a_deployment_long_ago_only_the_record_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments, "SETTLE", 0.1)
    gateway = Gateway([record("succeeded")], [GAP])
    async with serving(gateway) as client:
        assert [event.type async for event in client.deployment("d-1").events()] == ["gap"]


async def test_waiting_gives_the_record_of_a_success() -> None:
    gateway = Gateway([record("running"), record("running"), record("succeeded")], [GAP, STARTED, SUCCEEDED])
    async with serving(gateway) as client:
        ended = await client.deployment("d-1").wait()
    assert (ended.state, ended.url, ended.error) == ("succeeded", "http://shop.example", None)
    assert [(phase.name, phase.ms) for phase in ended.phases] == [("validate", 3)]


async def test_waiting_for_what_failed_raises_its_type_with_its_facts() -> None:
    error = {"code": "timeout", "message": "it never answered", "phase": "verify", "reason": "never_healthy"}
    async with serving(Gateway([record("rolledback", error)])) as client:
        with pytest.raises(errors.Timeout, match="it never answered") as caught:
            await client.deployment("d-1").wait()
        assert caught.value.facts == {"phase": "verify", "reason": "never_healthy"}
        (listed,) = [await client.deployment("d-1").record()]
    assert isinstance(listed.error, errors.Timeout)
