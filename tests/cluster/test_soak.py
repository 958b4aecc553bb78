"""Gateways, incusds and whole members die or are restarted, at random, under clients of all tenants.

GATEWAY_TEST_KILLS is how many (default 3), GATEWAY_TEST_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import pytest

from tests.cluster.conftest import MakeTenant, Served, heal, slack
from tests.cluster.rig import Member
from tests.cluster.test_dying import leader
from tests.cluster.working import Work, working
from tests.waits import pause, until

KILLS = int(os.environ.get("GATEWAY_TEST_KILLS", "3"))
SEED = int(os.environ.get("GATEWAY_TEST_SEED", "0")) or random.randrange(1, 1 << 30)

Client = Callable[[Member], Served]

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(300 + 120 * KILLS)]

# of a machine that all three members share; of a server each the goals are 1, 10 and 10
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
_OF_TWO: Final = 0.1  # of all faults; most members are away then


@dataclass(frozen=True)
class Fault:
    """What happens to members, for how many seconds."""

    strike: Callable[[Member], None]
    struck: Sequence[Member]
    seconds: float

    @classmethod
    def chosen(cls, by: random.Random, members: Sequence[Member]) -> Fault:
        strike, seconds = by.choice(_FAULTS), by.uniform(0.5, 8)
        return cls(strike, by.sample(members, 2 if by.random() < _OF_TWO else 1), seconds)

    def __str__(self) -> str:
        names = " and ".join(member.name for member in self.struck)
        return f"{self.strike.__name__} of {names} for {self.seconds:.1f} s"


async def test_random_kills_lose_and_double_no_call(
    members: tuple[Member, ...], client: Client, make_tenant: MakeTenant
) -> None:
    """Nor is a tenant told to be destroyed, nor does a list wait; and all is well soon afterwards."""
    chosen = random.Random(SEED)
    homes = {await make_tenant(member): member for member in members}
    gateways = [client(member) for member in members]
    print({name: home.name for name, home in homes.items()})
    print(f"GATEWAY_TEST_SEED={SEED}")
    took = list[float]()
    async with working(gateways, [*homes]) as work:
        for number in range(KILLS):
            fault = Fault.chosen(chosen, members)
            print(f"{number}: {fault}")
            took.append(await _struck(work, homes, fault))
    print(f"well again after {', '.join(f'{seconds:.1f}' for seconds in sorted(took))} s")


async def _struck(work: Work, homes: dict[str, Member], fault: Fault) -> float:
    """Have a fault, and its members healed; see that all is well in time, and return how soon that was."""
    leads = await asyncio.to_thread(leader, tuple(homes.values())) in fault.struck
    incusd = fault.strike not in (kill_gateway, restart_gateway)
    living = [gateway for gateway in work.gateways if gateway.member not in fault.struck]
    tenants = [name for name, home in homes.items() if home not in fault.struck]
    work.lists.clear()
    work.calls.clear()
    before, began = work.decided(), time.monotonic()
    await asyncio.gather(*(asyncio.to_thread(fault.strike, member) for member in fault.struck))
    await pause(fault.seconds)
    no_quorum = incusd and len(fault.struck) > 1
    if not no_quorum:
        await work.well(_WELL * slack(), living, tenants)
    served = time.monotonic() - began
    await asyncio.gather(*(asyncio.to_thread(heal, member) for member in fault.struck))
    healed = time.monotonic() - began - served
    took = await work.well(_BACK * slack())
    await until(lambda: work.decided() > before, 30, every=0.1)
    slowest = max(work.lists, default=0.0)
    print(
        f"   {'which leads; ' * leads}others well after {served:.1f} s, healed in {healed:.1f}, all well"
        f" {took:.1f} s later; the slowest list took {slowest:.1f} s,"
        f" the slowest calls {sorted(work.calls)[-3:]}, load {os.getloadavg()[0]:.0f}"
    )
    assert slowest < (_WELL if no_quorum or (leads and incusd) else _LIST) * slack()
    return took
