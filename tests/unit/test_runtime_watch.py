"""The watch of Incus's events misses nothing, and ends when cancelled, whatever it is doing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from gateway.incus import Incus, IncusError
from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings
from tests.unit.incusd import instance


class Slow(Incus):
    """An Incus with a silent event stream, whose second answer never arrives."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.asked = 0
        self.stuck = asyncio.Event()

    async def events(self, *types: str) -> AsyncGenerator[dict[str, Any]]:
        yield {"type": "connected"}
        await asyncio.Event().wait()

    async def get(self, path: str, **query: str) -> Any:
        if path == "/1.0":
            return {}
        self.asked += 1
        if self.asked > 1:
            self.stuck.set()
            await asyncio.Event().wait()
        return []


async def test_a_cancel_while_instances_are_listed_is_not_lost(tmp_path: Path) -> None:
    """Otherwise the gateway would never end."""
    slow = Slow()
    runtime = IncusRuntime(Settings(state_dir=tmp_path, reconcile_interval=0.01), incus=slow)

    async def watch() -> None:
        async for _ in runtime.changes.watch():
            pass

    watching = asyncio.create_task(watch())
    await asyncio.wait_for(slow.stuck.wait(), 30)
    watching.cancel()
    await asyncio.wait([watching], timeout=30)
    assert watching.done()
    with pytest.raises(asyncio.CancelledError):
        await watching


class Passing(Incus):
    """An Incus without instances, in which one is created and deleted."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"), "default", 1.0)
        self.gone = False

    async def events(self, *types: str) -> AsyncGenerator[dict[str, Any]]:
        yield {"type": "connected"}
        for action in ("created", "started", "deleted"):
            self.gone = action == "deleted"
            yield {"type": "lifecycle", "metadata": {"action": f"instance-{action}", "name": "shop"}}
        await asyncio.Event().wait()

    async def instances(self, **_: Any) -> list[dict[str, Any]]:
        return []

    async def instance(self, name: str, **_: Any) -> dict[str, Any]:
        if self.gone:
            raise IncusError("Instance not found", 404)
        return instance(name, status="Running")


async def test_the_end_of_the_first_tenant_is_told(tmp_path: Path) -> None:
    """It did not exist when the watch began, and is already gone when its end is reported."""
    runtime = IncusRuntime(Settings(state_dir=tmp_path), incus=Passing())
    told = []
    async with asyncio.timeout(30):
        async for event in runtime.changes.watch():
            told.append(event.type)
            if event.type == "tenant.destroyed":
                break
    expected = ["gateway.resynced", "tenant.created", "tenant.started", "tenant.stopped", "tenant.destroyed"]
    assert told == expected
