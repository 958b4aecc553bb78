"""A gateway beside its holder, either of which is killed and started again.

GATEWAY_TEST_KILLS says how often, and GATEWAY_TEST_SEED at which moments; both are printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.holder import holding
from gateway.holder.holder import held_at
from gateway.host.services import holder_command
from gateway.incus import ExecMemory
from gateway.settings import Settings
from tests.live import LiveGateway
from tests.waits import until

SEED = int(os.environ.get("GATEWAY_TEST_SEED", random.randrange(1 << 32)))


class Host:
    """A gateway and its holder in one state dir; either can be killed and started again."""

    def __init__(self, settings: Settings, folder: Path, **more: str) -> None:
        self.settings = settings.model_copy(update={"state_dir": folder})
        self.gateway = LiveGateway(
            {
                "GATEWAY_INCUS_SOCKET": str(settings.incus_socket),
                "GATEWAY_NETWORK": settings.network,
                "GATEWAY_NETWORK_IPV4": settings.network_ipv4,
                "GATEWAY_POOL": settings.pool,
                "GATEWAY_STATE_DIR": str(folder),
                **more,
            },
            folder.with_suffix(".log"),
        )
        self.holder: asyncio.subprocess.Process | None = None
        self.away: list[float] = []  # seconds from each kill until a gateway was ready again

    async def hold(self) -> None:
        """Start a holder, and return once it listens."""
        self.holder = await asyncio.create_subprocess_exec(*holder_command(self.settings))
        await until(self._holds)

    def _holds(self) -> bool:
        with contextlib.suppress(OSError):
            return held_at(self.settings.holder_socket) >= 0
        return False

    @property
    def held(self) -> int:
        """How many commands the holder has, beside the shells that wait for one."""
        return len(self.noted())

    def noted(self) -> set[str]:
        """Return the ids of the commands that the holder has."""
        noted: list[Any] = [one.read_facts() for one in self.memories() if one.noted]
        return {str(one["facts"]["id"]) for one in noted}

    def memories(self) -> Iterator[ExecMemory]:
        """Yield the memory of each command and waiting shell that the holder has."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(str(self.settings.holder_socket))
            holding.send(connection, {"v": holding.VERSION, "list": True})
            while (received := holding.receive(connection)) is not None and "end" not in received[0]:
                memory, *others = received[1]
                holding.close(others)
                with contextlib.closing(ExecMemory(memory)) as one:
                    yield one

    async def kill(self, meanwhile: Callable[[], Awaitable[object]] | None = None) -> None:
        """Kill the gateway, and start another, after `meanwhile` if there is anything to do first."""
        began = time.monotonic()
        await self.gateway.stop(signal.SIGKILL)
        if meanwhile is not None:
            await meanwhile()
        await self.gateway.start()
        self.away.append(time.monotonic() - began)

    def report(self, what: str) -> None:
        """Print what was seen over the kills, and for how long the gateway was away."""
        away = sorted(self.away) or [0.0]
        print(
            f"{len(self.away)} kills, seed {SEED}: {what}; away for {away[len(away) // 2]:.2f} s (p50), "
            f"{away[-1]:.2f} s at most; load {os.getloadavg()[0]:.0f}"
        )

    async def end_holder(self) -> None:
        """Kill the holder."""
        assert self.holder is not None
        self.holder.kill()
        await self.holder.wait()

    async def close(self) -> None:
        await self.gateway.stop()
        await self.end_holder()


@contextlib.asynccontextmanager
async def held(settings: Settings, folder: Path, **more: str) -> AsyncIterator[Host]:
    """Run a gateway and its holder, which log no traceback; `more` are settings of the gateway's."""
    folder.mkdir()
    host = Host(settings, folder, **more)
    await host.hold()
    await host.gateway.start()
    try:
        yield host
    finally:
        await host.close()
    said = host.gateway.log.read_text()
    assert "Traceback" not in said, said


@pytest.fixture
async def host(incus_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with held(incus_settings, tmp_path_factory.mktemp("survive") / "state") as host:
        yield host
