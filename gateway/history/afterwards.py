"""Work that can wait until nothing else is to be done on the host, unless somebody needs its result."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from gateway.runtime.sites import Quiet, at_once

LONGEST: Final = 120.0  # seconds after which the eldest no longer waits for a quiet moment


class _Piece:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.until = loop.time() + LONGEST
        self.may_begin, self.over = asyncio.Event(), asyncio.Event()


class Afterwards:
    """Lets pieces of work begin one after another, while it is `quiet`. Used from the event loop only."""

    def __init__(self) -> None:
        self.quiet: Quiet = at_once
        self._waiting: dict[str, _Piece] = {}  # by tenant, the eldest first
        self._task: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Let nothing begin by itself any more."""
        if self._task is not None:
            self._task.cancel()

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for the turn of a tenant's piece of work, and do it inside. Each has one at a time."""
        piece = self._waiting[tenant] = _Piece(asyncio.get_running_loop())
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._one_by_one(), name="work that can wait")
        try:
            await piece.may_begin.wait()
            yield
        finally:
            self._waiting.pop(tenant)
            piece.over.set()

    def hurry(self, tenant: str) -> None:
        """Let a tenant's piece of work begin now: its result is needed."""
        if (piece := self._waiting.get(tenant)) is not None:
            piece.may_begin.set()

    async def finish(self) -> None:
        """Do all that waits, still one after another."""
        self.close()
        while self._waiting:
            await self._begin(next(iter(self._waiting.values())))

    async def _one_by_one(self) -> None:
        while self._waiting:
            eldest = next(iter(self._waiting.values()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(eldest.until):
                    await self.quiet()
            await self._begin(eldest)

    async def _begin(self, piece: _Piece) -> None:
        piece.may_begin.set()
        await piece.over.wait()
