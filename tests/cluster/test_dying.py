"""A server dies: what the clients of the others see of it, call by call."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

import aiohttp
import pytest

from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member
from tests.contracts.gateway import sse
from tests.contracts.processes import mark
from tests.waits import pause, until

pytestmark = [pytest.mark.timeout(400), pytest.mark.thorough]

Client = Callable[[Member], Served]

_EACH: Final = 0.1  # seconds between two calls of one client
_COUNT: Final = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.05; done"


def leader(members: tuple[Member, ...]) -> Member:
    found = members[0].query("/1.0/cluster/members?recursion=1")
    (name,) = [entry["server_name"] for entry in found if "database-leader" in entry["roles"]]
    return next(member for member in members if member.name == name)


@dataclass
class Calls:
    """What calls were answered, and how long the slowest took, in seconds."""

    statuses: list[int] = field(default_factory=list)
    slowest: float = 0.0

    def add(self, status: int, began: float) -> None:
        self.statuses.append(status)
        self.slowest = max(self.slowest, time.monotonic() - began)


async def commands(gateway: Served, tenant: str, said: Calls) -> None:
    """Run commands in a tenant, one after the other, forever."""
    while True:
        began = time.monotonic()
        status, answer = await gateway.ask("POST", f"/v1/tenants/{tenant}/exec", {"argv": ["true"]})
        said.add(status if status != 200 or answer["exit_code"] == 0 else 0, began)
        await pause(_EACH)


async def readiness(gateway: Served, said: Calls) -> None:
    while True:
        began = time.monotonic()
        status, _ = await gateway.ask("GET", "/readyz")
        said.add(status, began)
        await pause(_EACH)


@contextlib.asynccontextmanager
async def counting(gateway: Served, tenant: str) -> AsyncIterator[Callable[[], list[int]]]:
    """Follow a command that counts; yield what gives the numbers that came."""
    async with gateway.wire(tenant) as wire:
        started = await wire.call("exec/start", argv=["sh", "-c", _COUNT])
        channel = started["channel"]

        def numbers() -> list[int]:
            whole, _, _ = bytes(wire.output[channel, 1]).rpartition(b"\n")
            return [int(line) for line in whole.split()]

        assert await wire.until(lambda: len(numbers()) > 5, 20)
        yield numbers
        before = len(numbers())
        assert await wire.until(lambda: len(numbers()) > before, 20)
        await wire.call("exec/cancel", exec=started["exec"])


async def booted(gateway: Served, tenant: str) -> bool:
    status, said = await gateway.ask("POST", f"/v1/tenants/{tenant}/exec", {"argv": ["true"]})
    return status == 200 and said["exit_code"] == 0


@pytest.mark.parametrize("leads", [False, True], ids=["a member that does not lead", "the leader"])
async def test_a_power_cut_is_noticed_by_nobody_else_but_for_some_seconds_by_the_leaders(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant, leads: bool
) -> None:
    """Not one call of others' tenants fails. Of a leader's they wait until there is another, and `/readyz`
    says so; no output is lost meanwhile.
    """
    first = leader(members)
    dead = first if leads else next(member for member in reversed(members) if member is not first)
    living = [client(member) for member in members if member is not dead]
    tenants = [await make_tenant(gateway.member) for gateway in living]
    for gateway, tenant in zip(living, tenants, strict=True):
        await until(lambda: booted(gateway, tenant), 60, every=0.2)  # noqa: B023 - awaited at once
    home, across, ready = Calls(), Calls(), Calls()
    async with counting(living[0], tenants[0]) as numbers:
        clients = [
            asyncio.create_task(work)
            for work in (
                commands(living[0], tenants[0], home),
                commands(living[1], tenants[0], across),  # through the other gateway
                commands(living[1], tenants[1], home),
                readiness(living[0], ready),
            )
        ]
        try:
            await asyncio.to_thread(dead.cut_power)
            before = len(home.statuses), len(across.statuses)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(25):
                    await asyncio.wait(clients, return_when=asyncio.FIRST_EXCEPTION)
            assert not [task.exception() for task in clients if task.done()]
            assert len(home.statuses) > before[0] + 10 and len(across.statuses) > before[1] + 10
            print(f"slowest: {home.slowest:.1f} s at home, {across.slowest:.1f} s across")
            assert set(home.statuses) == set(across.statuses) == {200}
            assert max(home.slowest, across.slowest) < (10 if leads else 2)
            assert set(ready.statuses) == ({200, 503} if leads else {200})
            assert ready.slowest < 3
        finally:
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    assert numbers() == list(range(1, len(numbers()) + 1))
    await asyncio.to_thread(heal, dead)


async def test_a_member_whose_cable_is_out_for_a_minute_is_back_with_its_commands(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """It loses nothing but its visitors: its tenants are away, and those of the others are not."""
    first = leader(members)
    cut, living = client(first), client(next(member for member in members if member is not first))
    away, stays = await make_tenant(cut.member), await make_tenant(living.member)
    for gateway, tenant in ((cut, away), (living, stays)):
        await until(lambda: booted(gateway, tenant), 60, every=0.2)  # noqa: B023 - awaited at once
    async with cut.wire(away) as wire:
        words = ["sh", "-c", f"exec >/dev/null; {_COUNT}"]
        started = await wire.call("exec/start", argv=words, lingerMs=600_000)
    calls = Calls()
    calling = asyncio.create_task(commands(living, stays, calls))
    try:
        await asyncio.to_thread(cut.member.unplug)
        began = time.monotonic()

        async def told() -> bool:
            status, said = await living.ask("GET", f"/v1/tenants/{away}")
            return status == 503 and bool(said["reason"] == "member_away")

        await until(told, 10, every=0.2)
        await pause(max(0, began + 60 - time.monotonic()))
        assert set(calls.statuses) == {200} and calls.slowest < 10
        await asyncio.to_thread(cut.member.plug)
        await until(lambda: booted(living, away), 10, every=0.2)  # asked through another gateway
        async with living.wire(away) as wire:
            states = {one["exec"]: one["state"] for one in (await wire.call("exec/list"))["execs"]}
            assert states[started["exec"]] == "running"  # those that have ended are listed besides
            await wire.call("exec/cancel", exec=started["exec"])
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
        await asyncio.to_thread(heal, cut.member)


@pytest.mark.short
async def test_who_follows_all_tenants_goes_on_at_another_gateway_when_one_is_killed(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """Of what happened before, meanwhile and afterwards, on each member, it is told once."""
    killed, other, _ = (client(member) for member in members)
    tenants = [await make_tenant(member) for member in members]
    for tenant in tenants:
        await until(lambda: booted(other, tenant), 60, every=0.2)  # noqa: B023 - awaited at once
    keys = mark()

    async def act(when: str, *of: str) -> None:
        for tenant in of:
            body, key = {"command": "true"}, f"{keys} {when} {tenant}"
            status, _ = await other.ask("POST", f"/v1/tenants/{tenant}/tools/Bash", body, Idempotency_Key=key)
            assert status == 200

    calls, last = list[str](), ""

    async def take(events: aiohttp.ClientResponse, count: int) -> None:
        """Take in the next calls that are told, whatever is told of members besides."""
        nonlocal last
        wanted = len(calls) + count
        while len(calls) < wanted:
            (one,) = await sse(events, 1)
            last = one["id"]
            if one["event"] == "tool.finished":
                calls.append(one["data"]["data"]["callId"])

    path = "/v1/events?type=tool.finished"
    async with killed.http("*") as http, http.get(path) as events:
        await act("before", *tenants)
        await take(events, 3)
        await asyncio.to_thread(killed.member.ours, "kill", "gateway")
        await act("meanwhile", *tenants[1:])
    async with other.http("*") as http:
        async with http.get(path, headers={"Last-Event-ID": last}) as events:
            await take(events, 2)
            await asyncio.to_thread(heal, killed.member)
            await until(lambda: booted(other, tenants[0]), 60, every=0.2)
            await act("afterwards", *tenants)
            await take(events, 3)
    of = {"before": tenants, "meanwhile": tenants[1:], "afterwards": tenants}
    assert sorted(calls) == sorted(f"{keys} {when} {tenant}" for when, some in of.items() for tenant in some)
