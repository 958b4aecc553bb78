"""Tenants that nobody uses sleep, and whoever asks wakes them. A subclass gives `sleepy` and `tenants`."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from tests.contracts.gateway import sse
from tests.live import LiveGateway
from tests.waits import pause


@contextlib.asynccontextmanager
async def told(gateway: LiveGateway, tenant: str, kinds: str) -> AsyncIterator[aiohttp.ClientResponse]:
    async with (
        gateway.http(tenant) as http,
        http.get("/v1/events", params={"tenant": tenant, "type": kinds}) as events,
    ):
        yield events


async def echo(http: aiohttp.ClientSession, tenant: str) -> str:
    given = {"command": "echo awake"}
    async with http.post(f"/v1/tenants/{tenant}/tools/Bash", json=given) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["content"][0]["text"])


async def get(http: aiohttp.ClientSession, tenant: str) -> dict[str, Any]:
    async with http.get(f"/v1/tenants/{tenant}") as response:
        return dict(await response.json())


class IdleContract:
    """`sleepy` is a gateway whose `tenants`, three, sleep after half a second."""

    async def test_who_is_not_used_sleeps_and_a_tool_call_wakes_it(
        self, sleepy: LiveGateway, tenants: tuple[str, ...]
    ) -> None:
        tenant = tenants[0]
        async with gateway_and_events(sleepy, tenant) as (http, events):
            await echo(http, tenant)
            (stopped,) = await sse(events, 1)
            assert (stopped["event"], stopped["data"]["data"]["reason"]) == ("tenant.stopped", "idle")
            found = await get(http, tenant)
            assert (found["status"], found["asleep"]) == ("stopped", True)
            assert await echo(http, tenant) == "awake"
            (started,) = await sse(events, 1)
            assert (started["event"], started["data"]["data"]["reason"]) == ("tenant.started", "wake")
            found = await get(http, tenant)
            assert (found["status"], found["asleep"]) == ("running", False)

    async def test_a_websocket_and_a_command_keep_a_tenant_awake(
        self, sleepy: LiveGateway, tenants: tuple[str, ...]
    ) -> None:
        idle, watched, busy = tenants
        async with gateway_and_events(sleepy, idle) as (http, events), sleepy.wire(watched):
            async with sleepy.wire(busy) as wire:
                started = await wire.call("exec/start", argv=["sleep", "600"], lingerMs=-1)
            for _ in range(2):  # meanwhile another one falls asleep twice
                await echo(http, idle)
                while (await sse(events, 1))[0]["event"] != "tenant.stopped":
                    pass
            async with sleepy.http(watched, busy) as others:
                for tenant in (watched, busy):
                    assert (await get(others, tenant))["status"] == "running"
            async with sleepy.wire(busy) as wire:
                await wire.call("exec/attach", exec=started["exec"])
                await wire.call("exec/cancel", exec=started["exec"], graceMs=0)
            async with told(sleepy, busy, "tenant.stopped") as stopped:
                assert (await sse(stopped, 1))[0]["data"]["data"]["reason"] == "idle"

    async def test_a_tenant_is_put_to_sleep_at_once_unless_it_is_used(
        self, sleepy: LiveGateway, tenants: tuple[str, ...]
    ) -> None:
        """By whoever asks for it; a command that runs keeps it awake, and is named."""
        tenant = tenants[2]
        async with sleepy.http(tenant) as http:
            async with sleepy.wire(tenant) as wire:
                started = await wire.call("exec/start", argv=["sleep", "600"], lingerMs=-1)
                async with http.post(f"/v1/tenants/{tenant}/sleep") as response:
                    refused = await response.json()
                    assert (response.status, refused["reason"]) == (409, "in_use")
                assert "commands that run in it: 1" in refused["detail"]
                await wire.call("exec/cancel", exec=started["exec"], graceMs=0)
            found: dict[str, Any] = {"code": "conflict"}
            while found.get("code") == "conflict":  # until the gateway has seen that nobody uses it
                async with http.post(f"/v1/tenants/{tenant}/sleep") as response:
                    found = await response.json()
            assert found["asleep"] is True
            assert await echo(http, tenant) == "awake"

    async def test_a_websocket_wakes_a_tenant(self, sleepy: LiveGateway, tenants: tuple[str, ...]) -> None:
        tenant = tenants[1]
        async with gateway_and_events(sleepy, tenant) as (http, events):
            await echo(http, tenant)
            while (await sse(events, 1))[0]["event"] != "tenant.stopped":
                pass
            async with sleepy.wire(tenant) as wire:
                exit_, said, _ = await wire.run(argv=["echo", "awake"])
                assert (exit_["exitCode"], said) == (0, b"awake\n")

    async def test_who_was_stopped_by_somebody_stays_stopped(
        self, sleepy: LiveGateway, tenants: tuple[str, ...]
    ) -> None:
        tenant = tenants[2]
        async with gateway_and_events(sleepy, tenant) as (http, events):
            await echo(http, tenant)
            while (await sse(events, 1))[0]["event"] != "tenant.stopped":
                pass
            async with http.post(f"/v1/tenants/{tenant}/stop") as response:
                assert (await response.json())["asleep"] is False
            given = {"argv": ["true"]}
            async with http.post(f"/v1/tenants/{tenant}/exec", json=given) as response:
                assert (response.status, (await response.json())["code"]) == (409, "tenant_not_running")
            async with http.post(f"/v1/tenants/{tenant}/start") as response:
                assert (await response.json())["status"] == "running"
            assert await echo(http, tenant) == "awake"

    async def test_no_call_is_lost_while_a_tenant_falls_asleep(
        self, sleepy: LiveGateway, tenants: tuple[str, ...]
    ) -> None:
        tenant, chance = tenants[0], random.Random(5)
        async with sleepy.http(tenant) as http:
            for _ in range(6):
                # at any moment between still awake and asleep
                await pause(chance.uniform(0.4, 1.6))
                assert await asyncio.gather(*(echo(http, tenant) for _ in range(3))) == ["awake"] * 3


@contextlib.asynccontextmanager
async def gateway_and_events(
    gateway: LiveGateway, tenant: str
) -> AsyncIterator[tuple[aiohttp.ClientSession, aiohttp.ClientResponse]]:
    """Give a client of the tenant that has it awake, and the events of its starts and stops from then on."""
    async with gateway.http(tenant) as http:
        await echo(http, tenant)
        async with told(gateway, tenant, "tenant.stopped,tenant.started") as events:
            yield http, events
