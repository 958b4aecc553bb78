"""Find a container's init process through its LXC monitor, the host process that supervises it.

Incus reports the pid only in an instance's `state`, for which it starts two processes and walks the quotas of
all disks. The files read here are small and belong to the host; a tenant controls none of them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from gateway.bounds import part
from gateway.incus.rest import BASE, IncusError, unreachable

# hybrid cgroup hosts first, then pure v2 ones
_TREES: Final = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
_BYTES: Final = 1024
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_SLACK: Final = 0.1  # seconds by which the kernel's start time may precede incusd's


def first_process(directory: Path, container: str, since: str) -> int:
    """Return the host pid of a container's init process, 0 if it cannot be determined safely.

    `directory` is this incusd's directory: another daemon on the host may have a container of the same name.
    `container` includes the project's prefix, as in host paths. `since` is the start time reported by Incus,
    because a previous run of the container may still be shutting down.
    """
    title = f"[lxc monitor] {directory}/containers {container}".encode()
    for tree in _TREES:
        try:
            (monitor,) = part(f"{tree}/lxc.monitor.{container}/cgroup.procs", _BYTES).split()
            pid = int(monitor)
            if part(f"/proc/{pid}/cmdline", _BYTES).rstrip(b"\0 ") != title:
                return 0
            (child,) = part(f"/proc/{pid}/task/{pid}/children", _BYTES).split()
            return (
                int(child) if _began(int(child)) >= datetime.fromisoformat(since).timestamp() - _SLACK else 0
            )
        except FileNotFoundError:
            continue
        except (OSError, ValueError, IndexError):
            return 0  # it is just starting or ending, or is not ours
    return 0


def _began(pid: int) -> float:
    """Return a process's start time in seconds since the epoch."""
    after_name = part(f"/proc/{pid}/stat", _BYTES).rpartition(b")")[2].split()
    ago = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / _TICKS
    return time.time() - ago


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
