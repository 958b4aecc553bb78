"""Many tenants at once on one gateway: deployments beside one another, lists, events.

GATEWAY_TEST_CROWD says how many.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.settings import Settings
from tests.integration import environment
from tests.integration.sites import Hosting, hosting
from tests.waits import until

pytestmark = pytest.mark.timeout(300)
CROWD = int(os.environ.get("GATEWAY_TEST_CROWD", "8"))
AT_ONCE = 4
POOL = 2


async def test_a_crowd_is_deployed_four_at_a_time(incus_settings: Settings, tmp_path: Path) -> None:
    """Every deployment succeeds while copies for the next ones are made, claimed and renamed beside it.

    incusd breaks where an instance is changed that is still being copied: a healthy pool was told missing.
    """
    async with hosting(incus_settings, tmp_path / "state", golden=True, warm_pool=POOL) as host:
        assert (await host.deploy("first.test"))["state"] == "succeeded"
        await until(lambda: asyncio.to_thread(_is_filled), 120, every=0.2)
        slots = asyncio.Semaphore(AT_ONCE)
        listing: list[float] = []

        async def one(number: int) -> tuple[dict[str, Any], float]:
            async with slots:
                began = time.monotonic()
                record = await host.deploy(f"crowd{number}.test")
                took = time.monotonic() - began
                listing.append(await _list_time(host))
                return record, took

        done = await asyncio.gather(*(one(number) for number in range(CROWD)))
        failed = [record["error"] for record, _ in done if record["state"] != "succeeded"]
        assert not failed
        sources = Counter(record["source"] for record, _ in done)
        assert sources["pool"], sources
        times = [took for _, took in done]
        print(
            f"{CROWD} deployments, {AT_ONCE} at a time: p50 {statistics.median(times):.2f} s, "
            f"at most {max(times):.2f}; {dict(sources)}; GET /v1/tenants p50 "
            f"{statistics.median(listing) * 1000:.0f} ms beside them"
        )
        answers = await asyncio.gather(*(host.visit(f"crowd{number}.test") for number in range(CROWD)))
        assert {status for status, _ in answers} == {200}
        addresses = [
            device["ipv4.address"]
            for entry in environment.instances()
            for device in entry["devices"].values()
            if "ipv4.address" in device
        ]
        assert len(addresses) == len(set(addresses))


def _is_filled() -> bool:
    """Say whether as many wait for a deployment as may; nobody tells."""
    roles = [(entry["config"] or {}).get("user.gateway.role") for entry in environment.instances()]
    return roles.count("pool") == POOL


async def _list_time(host: Hosting) -> float:
    began = time.monotonic()
    status, found, _ = await host.call("GET", "/v1/tenants")
    assert status == 200 and found["tenants"]
    return time.monotonic() - began
