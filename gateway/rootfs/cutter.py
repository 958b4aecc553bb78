"""Closes connections to dead members without incusd, while the cluster is broken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from gateway.errors import Unavailable
from gateway.rootfs import connections
from gateway.rootfs.broker_client import BrokerClient
from gateway.settings import Settings


class Cutter:
    """Asks the broker at a socket, or does it in this process as root without one.

    Not by the connection of the file tools: their requests wait for incusd meanwhile.
    """

    def __init__(self, settings: Settings) -> None:
        at = settings.broker_socket
        self._broker = None if at is None else BrokerClient(at=at)
        self._incus = settings.incus_socket.parent

    async def cut_off(self, member: str) -> int:
        """Close the connections with a member's Incus at HOST:PORT; return how many.

        Raises `NotFound` and `Unavailable`.
        """

        def cut() -> dict[str, Any]:
            return {"ended": connections.cut_off(member, connections.members(self._incus))}

        return int((await self._do({"do": "cut_off", "member": member}, cut))["ended"])

    async def _do(self, request: dict[str, Any], here: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        if self._broker is not None:
            return (await self._broker.request(request))[0]
        try:
            return await asyncio.to_thread(here)
        except OSError as error:
            raise Unavailable(f"this process may not {request['do']}: {error}") from error

    async def aclose(self) -> None:
        if self._broker is not None:
            await self._broker.aclose()
