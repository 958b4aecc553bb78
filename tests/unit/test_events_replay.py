"""Replay from a live gateway's journal: as much as it keeps, and to each token only its own events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.runtime.local import LocalRuntime
from gateway.settings import Settings
from tests.contracts.gateway import sse
from tests.live import LiveGateway, local_gateway
from tests.waits import until

KEPT = 20
DEADLINE = 60.0


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LiveGateway]:
    # without a history: its recordings are events, too
    fields = {"GATEWAY_EVENTS_KEPT": str(KEPT), "GATEWAY_HISTORY": "false"}
    gateway = await local_gateway(tmp_path, "demo", "other", **fields)
    await gateway.start()
    yield gateway
    assert await gateway.stop() == 0


async def run(gateway: LiveGateway, tenant: str, times: int = 1) -> None:
    """Run commands that cause two events each, and wait until all of these are readable.

    An answer may arrive before its events are written.
    """
    async with gateway.http(tenant) as http:
        for _ in range(times):
            async with http.post(f"/v1/tenants/{tenant}/exec", json={"argv": ["true"]}) as response:
                assert response.status == 200
                last = (await response.json())["exec"]
        async with http.get("/v1/events", params={"lastEventId": "0", "type": "exec.exited"}) as response:
            exec_ = None
            while exec_ != last:
                (event,) = await sse(response, 1, DEADLINE)
                exec_ = event["data"]["data"].get("exec")


async def replayed(gateway: LiveGateway, token: str, after: int, wanted: int, **query: str) -> list[Any]:
    """Return the next events after an id, as seen with one tenant's token."""
    async with gateway.http(token) as http:
        query["lastEventId"] = str(after)
        async with http.get("/v1/events", params=query) as response:
            return await sse(response, wanted, DEADLINE)


async def begin(gateway: LiveGateway) -> int:
    """Run a command in each tenant; return the id of their first event."""
    async with gateway.http("demo") as http, http.get("/v1/events", params={"type": "exec.*"}) as response:
        await run(gateway, "demo")
        first = int((await sse(response, 1, DEADLINE))[0]["id"])
    await run(gateway, "other")
    return first


async def test_replay_is_of_the_tokens_tenants_alone(gateway: LiveGateway) -> None:
    """Whatever it requests; other tenants' events leave no trace except missing ids."""
    first = await begin(gateway)
    await run(gateway, "demo")
    for query in ({}, {"tenant": "demo,other"}, {"type": "*"}):
        found = await replayed(gateway, "demo", first - 1, 4, **query)
        assert [(event["event"], event["data"]["subject"]) for event in found] == [
            ("exec.started", "demo"),
            ("exec.exited", "demo"),
        ] * 2
    found = await replayed(gateway, "other", first - 1, 2, tenant="demo,other")
    assert [event["data"]["subject"] for event in found] == ["other", "other"]
    # it holds across a restart, when all comes from disk
    await gateway.stop()
    await gateway.start()
    found = await replayed(gateway, "other", first - 1, 2, type="exec.*")
    assert [event["data"]["subject"] for event in found] == ["other", "other"]


async def test_what_is_kept_is_bounded_by_count_and_by_age(gateway: LiveGateway) -> None:
    """Dropped events become a gap that tells where the rest begins; another tenant's are complete."""
    first = await begin(gateway)
    await run(gateway, "demo", KEPT)
    some = KEPT // 2
    found = await replayed(gateway, "demo", first - 1, 1 + some, type="exec.*")
    assert [event["event"] for event in found[:1]] == ["gap"]
    ids = [int(event["id"]) for event in found[1:]]
    assert found[0]["data"]["data"] == {"oldest": ids[0]}
    assert ids == list(range(ids[0], ids[0] + some))
    assert [int(event["id"]) for event in await replayed(gateway, "demo", ids[0], some - 1)] == ids[1:]
    others = await replayed(gateway, "other", first - 1, 2, tenant="other")
    assert [event["event"] for event in others] == ["exec.started", "exec.exited"]
    await gateway.stop()
    gateway.environment["GATEWAY_EVENTS_AGE"] = "1"
    await gateway.start()
    now: Any = None

    async def gone() -> bool:  # nobody tells what is no longer kept
        nonlocal now
        (now,) = await replayed(gateway, "demo", ids[-1] - 2, 1)
        return bool(now["event"] == "gap")

    await until(gone, 60, every=0.1)
    assert now["data"]["data"]["oldest"] >= ids[-1]


async def test_a_successor_gets_nothing_of_who_had_its_name(gateway: LiveGateway) -> None:
    """Over HTTP, by websocket and after a restart; a token for all tenants gets everything."""
    first = await begin(gateway)

    async def seen() -> list[Any]:
        found = await replayed(gateway, "demo", first - 1, 5, type="exec.*,tenant.*")
        async with gateway.wire("demo") as wire:
            await wire.call("events/subscribe", types=["exec.*", "tenant.*"], lastEventId=first - 1)
            told = [found[-1]["id"]]
            await wire.until(lambda: wire.notified("event", id=told[0]))
            same = [said.params["id"] for said in wire.notifications if said.method == "event"]
        assert same == [event["id"] for event in found]
        return [event["event"] for event in found]

    async with gateway.http("demo", "other") as http:
        async with http.delete("/v1/tenants/demo") as response:
            assert response.status == 204
        async with http.post("/v1/tenants/other/clone", json={"tenant": "demo"}) as response:
            assert response.status == 201
    await run(gateway, "demo")
    mine = [*("tenant.destroyed", "tenant.created", "tenant.started"), *("exec.started", "exec.exited")]
    assert await seen() == mine
    await gateway.stop()
    await gateway.start()
    assert await seen() == mine
    all_ = await replayed(gateway, "*", first - 1, 2, tenant="demo", type="exec.*")
    assert [int(event["id"]) for event in all_] == [first, first + 1]


async def test_a_successor_that_came_while_the_gateway_was_away_is_told_apart(gateway: LiveGateway) -> None:
    """By the runtime's facts, because no event reported its predecessor's end. It gets no receipts either."""
    first = await begin(gateway)
    write = {"name": "Write", "arguments": {"file_path": "a", "content": "mine"}, "callId": "c1"}
    async with gateway.wire("demo") as wire:
        assert not (await wire.call("tools/call", **write))["isError"]
    await gateway.stop()
    folder = Path(gateway.environment["GATEWAY_STATE_DIR"])
    async with LocalRuntime(Settings(runtime="local", state_dir=folder)) as runtime:
        await runtime.tenants.destroy("demo")
        await runtime.tenants.create("demo")
    await gateway.start()
    # it answers before it has looked: whose token is older than the end that it tells of gets a gap
    await replayed(gateway, "*", first - 1, 1, type="tenant.destroyed")
    found = await replayed(gateway, "demo", first - 1, 3, type="exec.*,file.*,tenant.*")
    assert [(event["event"], event["data"]["data"]) for event in found] == [
        (f"tenant.{kind}", {"resync": True}) for kind in ("destroyed", "created", "started")
    ]
    async with gateway.wire("demo") as wire, gateway.http("demo") as http:
        assert not (await wire.call("tools/call", **write))["isError"]
        async with http.get("/v1/tenants/demo/files/a") as response:
            assert await response.read() == b"mine"
