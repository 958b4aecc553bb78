"""Gateways, incusds and whole members die or are restarted, at random, under clients of all tenants.

GATEWAY_TEST_KILLS is how many (default 3), GATEWAY_TEST_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Final

import pytest

from tests.cluster.conftest import MakeTenant, Served, heal
from tests.cluster.rig import Member
from tests.cluster.test_dying import leader
from tests.cluster.working import Work, working
from tests.waits import pause, until

KILLS = int(os.environ.get("GATEWAY_TEST_KILLS", "3"))
SEED = int(os.environ.get("GATEWAY_TEST_SEED", "0")) or random.randrange(1, 1 << 30)

Client = Callable[[Member], Served]

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(300 + 120 * KILLS)]

# of a busy machine with all three members; on a quiet one the goals are 1, 10 and 10
_LIST: Final = 5.0  # seconds for a list, while no incusd that leads is away
_WELL: Final = 30.0  # seconds until living members serve their own tenants
_BACK: Final = 60.0  # seconds until all is as before, once incusd and gateway of the member answer


def kill_gateway(member: Member) -> None:
    member.ours("kill", "gateway")


def restart_gateway(member: Member) -> None:
    member.ours("term", "gateway")


def kill_incusd(member: Member) -> None:
    member.ours("kill", "incusd")


def restart_incusd(member: Member) -> None:
    member.ours("term", "incusd")


def cut_power(member: Member) -> None:
    member.cut_power()


_FAULTS: Final = (kill_gateway, restart_gateway, kill_incusd, restart_incusd, cut_power)


async def test_random_kills_lose_and_double_no_call(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """Nor is a tenant told to be destroyed, nor does a list wait; and all is well soon afterwards."""
    chosen = random.Random(SEED)
    homes = {await make_tenant(member): member for member in members}
    gateways = [client(member) for member in members]
    print({name: home.name for name, home in homes.items()})
    print(f"GATEWAY_TEST_SEED={SEED}")
    async with working(gateways, [*homes]) as work:
        for number in range(KILLS):
            fault, member = chosen.choice(_FAULTS), chosen.choice(members)
            away = chosen.uniform(0.5, 8)
            await _struck(work, homes, fault, member, away, number)


async def _struck(
    work: Work,
    homes: dict[str, Member],
    fault: Callable[[Member], None],
    member: Member,
    away: float,
    number: int,
) -> None:
    """Have a fault, and the member healed `away` seconds later; see that all is well in time."""
    leads = await asyncio.to_thread(leader, tuple(homes.values())) is member
    incusd = fault not in (kill_gateway, restart_gateway)
    living = [gateway for gateway in work.gateways if gateway.member is not member]
    tenants = [name for name, home in homes.items() if home is not member]
    what = f"{number}: {fault.__name__} of {member.name}{', which leads' * leads}"
    print(what, f"for {away:.1f} s")
    work.lists.clear()
    work.calls.clear()
    before, began = work.decided(), time.monotonic()
    await asyncio.to_thread(fault, member)
    await pause(away)
    await until(lambda: work.is_well(living, tenants), _WELL, every=0.3)
    served = time.monotonic() - began
    await asyncio.to_thread(heal, member)
    healed = time.monotonic()
    await until(work.is_well, _BACK, every=0.3)
    await until(lambda: work.decided() > before, 30, every=0.1)
    slowest = max(work.lists, default=0.0)
    print(
        f"   others well after {served:.1f} s, healed in {healed - began - served:.1f}, all well"
        f" {time.monotonic() - healed:.1f} s later; the slowest list took {slowest:.1f} s,"
        f" the slowest calls {sorted(work.calls)[-3:]}"
    )
    assert slowest < (_WELL if leads and incusd else _LIST), what
