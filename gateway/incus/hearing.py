"""Hear incusd's events as they come, however slowly they are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Final

import aiohttp
import orjson

from gateway.incus.rest import BASE, IncusError, unreachable

_WAITING: Final = 10_000  # events
_EVENT_MAX: Final = 1 << 20  # bytes

Event = Mapping[str, Any]


async def heard(
    session: aiohttp.ClientSession,
    query: Mapping[str, str],
    wanted: Callable[[Event], bool],
    noted: Callable[[Event], None] = lambda event: None,
    listening: Callable[[bool], None] = lambda heard: None,
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield `connected`, then the events that are `wanted`; where the stream breaks raise `IncusError`.

    `noted` is called with each of these as soon as it comes, and `listening` when that begins and ends.
    """
    waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def hear(socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            listening(True)
            async for message in socket:
                if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                    event = orjson.loads(message.data)
                    if not wanted(event):
                        continue
                    noted(event)
                    if waiting.qsize() >= _WAITING:
                        raise IncusError("incusd's events arrive faster than they are read", 0)
                    waiting.put_nowait(event)
        finally:
            listening(False)
            waiting.put_nowait(None)

    try:
        # pongs are required here: without them incusd hangs up after 30 s. Our own heartbeat
        # detects a silent, half-dead stream.
        async with session.ws_connect(
            f"{BASE}/1.0/events",
            params=query,
            max_msg_size=_EVENT_MAX,
            compress=0,
            autoping=True,
            heartbeat=20,
        ) as socket:
            hearing = asyncio.create_task(hear(socket))
            try:
                yield {"type": "connected"}
                while (event := await waiting.get()) is not None:
                    yield event
                await hearing
            finally:
                hearing.cancel()
                await asyncio.gather(hearing, return_exceptions=True)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise unreachable(error) from error


def concerns(member: str, event: Event) -> bool:
    """Return whether a member need hear an event: not what happens to other members' instances.

    Profiles and the like are the whole cluster's, wherever they were changed.
    """
    if event.get("location") in (None, "", "none", member):
        return True
    action = str((event.get("metadata") or {}).get("action", ""))
    return event.get("type") == "lifecycle" and not action.startswith("instance-")
