"""What a gateway does while most members of its cluster are away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp
import pytest

from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member
from tests.live import Wire
from tests.waits import until

pytestmark = [pytest.mark.timeout(300), pytest.mark.thorough]


async def readiness(gateway: Served) -> tuple[int, str]:
    """Return status and reason of `/readyz`, which answers in time."""
    begun = time.monotonic()
    async with aiohttp.ClientSession() as session, session.get(f"{gateway.url}/readyz") as answer:
        said = await answer.json()
    assert time.monotonic() - begun < 5  # on a machine that is busy with three members' starts
    return answer.status, said.get("reason", "")


async def echoed(wire: Wire, channel: int, line: str) -> bool:
    """Return whether a command that copies its input does so."""
    await wire.stdin(channel, f"{line}\n".encode())
    return bool(await wire.until(lambda: line.encode() in wire.output[channel, 1], 10))


async def test_without_a_quorum_a_gateway_says_so_and_its_commands_go_on(
    members: tuple[Member, ...], client: Callable[[Member], Served], make_tenant: MakeTenant
) -> None:
    living, *others = members
    gateway = client(living)
    name = await make_tenant(living)

    async def booted() -> bool:
        status, said = await gateway.ask("POST", f"/v1/tenants/{name}/exec", {"argv": ["true"]})
        return status == 200 and said["exit_code"] == 0

    await until(booted, 30)
    assert await readiness(gateway) == (200, "")
    async with gateway.wire(name) as wire:
        started = await wire.call("exec/start", argv=["cat"], stdin=True)
        assert await echoed(wire, started["channel"], "before")
        try:
            for member in others:
                member.cut_power()

            async def says_so() -> bool:
                return await readiness(gateway) == (503, "no_quorum")

            await until(says_so, 30, every=0.2)
            assert await echoed(wire, started["channel"], "meanwhile")
        finally:
            await asyncio.gather(*(asyncio.to_thread(heal, member) for member in others))

        async def well() -> bool:
            return await readiness(gateway) == (200, "")

        await until(well, 60, every=0.2)
        assert await echoed(wire, started["channel"], "after")
