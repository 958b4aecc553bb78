"""Gateways of a cluster are replaced one after the other, under clients that never pause; without Incus.

`tests/cluster/test_rolling.py` does it with Incus, and with those of an earlier version.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.clusters import clustered
from tests.live import DEADLINE, LiveGateway
from tests.steady import steady


@pytest.mark.timeout(600)
async def test_no_call_is_lost_or_doubled_nor_is_its_end(tmp_path: Path) -> None:
    homes = {"m1": ("one",), "m2": ("two",), "m3": ("three",)}
    async with clustered(tmp_path, homes) as members:
        async with steady(members, ["one", "two", "three"]) as clients:
            for gateway in members.values():
                successor = LiveGateway(gateway.environment, gateway.log)
                successor.port, successor.url, successor.serve = (
                    gateway.port,
                    gateway.url,
                    ("serve", "--take-over"),
                )
                old = gateway.process
                assert old is not None
                await successor.start()  # returns at once: the old gateway answers on their common port
                gateway.process = successor.process
                # the successor starts, calls that change files end, and the old one closes everything
                assert await asyncio.wait_for(old.wait(), 2 * DEADLINE) == 0
                await clients.served()
