"""When routes are looked after: at once, and in a crowd of events no more than is good for others."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

from gateway.deployments.context import Context
from gateway.deployments.reconciler import Reconciler, Recovery
from tests.waits import pause, turn

TOOK = 0.02  # seconds of one look


class Looks(Reconciler):
    """Notes when it looks, and looks at nothing."""

    def __init__(self) -> None:
        settings = SimpleNamespace(reconcile_interval=60.0)
        parts = dict.fromkeys(("domains", "caddy", "sites", "register", "remote"))
        context: Any = SimpleNamespace(**parts, settings=settings)
        super().__init__(cast(Context, context), cast(Recovery, None))
        self.began: list[float] = []
        self.looked = asyncio.Event()

    async def reconcile(self) -> None:
        self.began.append(time.monotonic())
        await pause(TOOK)
        self.looked.set()


async def test_a_storm_of_events_leaves_most_of_the_time_to_others() -> None:
    looks = Looks()
    following = asyncio.create_task(looks.follow())
    try:
        async with asyncio.timeout(30):
            while len(looks.began) < 4:
                looks.look_soon()
                await turn()
    finally:
        following.cancel()
    assert all(after - before >= 10 * TOOK for before, after in pairwise(looks.began))


async def test_what_happens_while_it_rests_is_looked_at_after_it() -> None:
    looks = Looks()
    following = asyncio.create_task(looks.follow())
    try:
        async with asyncio.timeout(30):
            looks.look_soon()
            await looks.looked.wait()
            looks.looked.clear()
            looks.look_soon()
            await looks.looked.wait()
    finally:
        following.cancel()
    assert len(looks.began) == 2
