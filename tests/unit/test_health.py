"""Sites that hang, refuse and fail, as the watch from outside sees them; real sockets, no tenants."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from gateway.deployments.health import Health
from gateway.events import Bus
from gateway.runtime.sites import Exposure, Site, Sites
from gateway.settings import Settings

DEADLINE = 30


class Told:
    """A bus that hands over what is published."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[tuple[str, str, Any]] = asyncio.Queue()

    def publish(self, type: str, tenant: str, data: Any) -> None:
        self.events.put_nowait((type, tenant, data))


class Listed:
    def __init__(self, ports: dict[str, int]) -> None:
        self.ports = ports

    async def listed(self) -> Sequence[Site]:
        return [
            Site(tenant, f"{tenant}.test", True, Exposure("127.0.0.1", port, f"127.0.0.1:{port}"))
            for tenant, port in self.ports.items()
        ]


class Server:
    """A site that answers with `said`, and waits for ever where that is None."""

    def __init__(self, said: bytes | None) -> None:
        self.said = said

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        ended = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            if self.said is None:
                await ended.wait()
            else:
                writer.write(self.said)
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        yield server.sockets[0].getsockname()[1]
        ended.set()
        server.close()


@contextlib.asynccontextmanager
async def watching(told: Told, ports: dict[str, int], **changes: Any) -> AsyncIterator[Health]:
    settings = Settings(health_interval=0.02, **changes)
    async with Health(cast(Sites, Listed(ports)), cast(Bus, told), settings) as health:
        yield health


async def test_a_site_that_hangs_holds_up_no_look_at_another() -> None:
    """Others are found unhealthy after some failed looks, and healthy again, while one says nothing."""
    told, failing = Told(), Server(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with (
            asyncio.timeout(DEADLINE),
            Server(None).serving() as hangs,
            failing.serving() as fails,
            watching(
                told, {"hangs": hangs, "fails": fails, "away": nobody.getsockname()[1]}, health_timeout=3600
            ),
        ):
            both = [await told.events.get(), await told.events.get()]
            found = {tenant: (kind, data) for kind, tenant, data in both}
            kind, data = found["away"]
            assert (kind, data["failures"], data["why"]) == ("tenant.unhealthy", 3, "no connection")
            kind, data = found["fails"]
            assert (kind, data["failures"], data["why"]) == ("tenant.unhealthy", 3, "status 502")
            failing.said = b"HTTP/1.1 200 OK\r\n\r\n"
            assert (await told.events.get())[:2] == ("tenant.healthy", "fails")


async def test_a_site_that_says_nothing_for_long_is_unhealthy_at_once() -> None:
    told, hanging = Told(), Server(None)
    async with (
        asyncio.timeout(DEADLINE),
        hanging.serving() as hangs,
        watching(told, {"hangs": hangs}, health_timeout=0.2),
    ):
        kind, _, data = await told.events.get()
        assert (kind, data["failures"], data["why"]) == ("tenant.unhealthy", 1, "no answer in 0.2 s")
        hanging.said = b"HTTP/1.1 404 Not Found\r\n\r\n"
        assert (await told.events.get())[0] == "tenant.healthy"
