"""A host's capacity: who gets memory, and how many more tenants fit."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, cast

import pytest

from gateway import runtime
from gateway.errors import GatewayError, RateLimited, Unavailable
from gateway.limits.capacity import Capacity, Memory, limit_of
from gateway.runtime import TenantInstance
from gateway.settings import Settings
from tests.waits import turn

GiB = 1 << 30


class Tenants:
    """Tenants that can only be listed and stopped."""

    def __init__(self, **memory: str) -> None:
        self.of = {
            name: TenantInstance(name, "running", limits={"memory": limit}) for name, limit in memory.items()
        }

    async def list(self, *, addresses: bool = True) -> list[TenantInstance]:
        await turn()  # others have their turn in between, as while Incus is asked
        return [*self.of.values()]

    def stop(self, name: str) -> None:
        self.of[name] = TenantInstance(name, "stopped", limits=self.of[name].limits)


def capacity(tenants: Tenants, total: int = 4 * GiB, available: int = 4 * GiB, **changes: Any) -> Capacity:
    settings = Settings(**{"overcommit": 1.0, **changes})
    return Capacity(cast(runtime.TenantInstances, tenants), settings, lambda: Memory(total, available))


async def test_of_four_at_a_time_one_takes_the_last_place() -> None:
    """Admitted tenants that do not exist yet count as promised."""
    of = capacity(Tenants(a="3GiB"))
    entered, over = [], asyncio.Event()

    async def one(name: str) -> None:
        async with of.promise(name, "1GiB"):
            entered.append(name)
            await over.wait()

    tasks = [asyncio.create_task(one(f"new{number}")) for number in range(4)]
    done, _ = await asyncio.wait(tasks, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    while len(done) < 3:
        more, _ = await asyncio.wait(set(tasks) - done, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert more
        done |= more
    over.set()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [error for error in ended if isinstance(error, Unavailable)]
    assert len(entered) == 1 and len(refused) == 3
    assert {error.facts["reason"] for error in refused} == {"capacity"}
    assert all(error.facts["retry_after"] for error in refused)


async def test_a_place_is_free_again_once_its_tenant_came_to_nothing() -> None:
    of = capacity(Tenants())
    with contextlib.suppress(ZeroDivisionError):
        async with of.promise("a", "4GiB"):
            raise ZeroDivisionError
    async with of.promise("b", "4GiB"):
        pass


async def test_who_sleeps_is_promised_nothing_and_must_find_room_to_wake() -> None:
    tenants = Tenants(a="2GiB", b="2GiB")
    of = capacity(tenants)
    tenants.stop("a")
    async with of.promise("c", "2GiB"):
        with pytest.raises(Unavailable, match="2048 MiB"):
            async with of.promise("a"):
                pass
    async with of.promise("a"):
        pass


async def test_more_memory_for_one_that_runs_counts_only_what_is_more() -> None:
    of = capacity(Tenants(a="2GiB", b="1GiB"))
    async with of.promise("a", "3GiB"), of.promise("b"):
        with pytest.raises(Unavailable):
            async with of.promise("b", "2GiB"):
                pass
    async with of.promise("a", "1GiB"):  # less is never refused
        pass


async def test_nothing_is_started_while_memory_is_short() -> None:
    """Regardless of promises, because tenants may use all their memory."""
    of = capacity(Tenants(a="1GiB"), available=GiB // 8)
    with pytest.raises(Unavailable):
        async with of.promise("b", "512MiB"):
            pass
    async with of.promise("a"):  # it runs already
        pass


async def test_tenants_that_are_being_made_count_in_their_number() -> None:
    of = capacity(Tenants(a="1GiB"), max_tenants=2)
    async with of.promise("b", "1GiB"):
        with pytest.raises(RateLimited) as refused:
            async with of.promise("c", "1GiB"):
                pass
        assert refused.value.facts["reason"] == "quota"
        async with of.promise("b", "1GiB"):
            pass


async def test_a_refusal_names_no_figure_of_the_host() -> None:
    of = capacity(Tenants(a="3GiB"), total=4 * GiB + 12345)
    with pytest.raises(GatewayError) as refused:
        async with of.promise("b", "2GiB"):
            pass
    assert "4096" not in refused.value.message and "3072" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "limit"),
    [("512MiB", GiB // 2), ("25%", GiB), ("999999%", 4 * GiB), ("9PiB", 4 * GiB), (None, GiB)],
)
def test_limits_as_incus_takes_them(text: str | None, limit: int) -> None:
    assert limit_of(text, 4 * GiB, Settings()) == limit
