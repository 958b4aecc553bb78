"""The watch of Incus's events ends when it is told to, whatever it is at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from gateway.runtime.incus import IncusRuntime
from gateway.settings import Settings


class Slow:
    """An Incus whose stream stands and says nothing, and whose second answer never comes."""

    def __init__(self) -> None:
        self.asked = 0
        self.stuck = asyncio.Event()

    async def events(self, *types: str) -> AsyncGenerator[dict[str, Any]]:
        yield {"type": "connected"}
        await asyncio.Event().wait()

    async def get(self, path: str, **query: str) -> list[Any]:
        self.asked += 1
        if self.asked > 1:
            self.stuck.set()
            await asyncio.Event().wait()
        return []


async def test_a_cancel_while_instances_are_listed_is_not_lost(tmp_path: Path) -> None:
    """Else the gateway would never have ended."""
    runtime = IncusRuntime(Settings(state_dir=tmp_path, reconcile_interval=0.01))
    runtime._incus = slow = Slow()  # type: ignore[assignment]  # stands in

    async def watch() -> None:
        async for _ in runtime.watch():
            pass

    watching = asyncio.create_task(watch())
    await asyncio.wait_for(slow.stuck.wait(), 30)
    watching.cancel()
    await asyncio.wait([watching], timeout=30)
    assert watching.done()
    with pytest.raises(asyncio.CancelledError):
        await watching
