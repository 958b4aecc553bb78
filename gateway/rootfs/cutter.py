"""Has the connections with dead members cut by whoever may do that."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.errors import Unavailable
from gateway.rootfs import dead_members
from gateway.rootfs.broker_client import BrokerClient


class Cutter:
    """Has dead members cut off by who may: the broker at a socket, or without one this process, as root.

    Not by the connection of the file tools: their requests wait for incusd meanwhile.
    """

    def __init__(self, broker: Path | None, incus: Path) -> None:
        """`incus` is the folder of incusd."""
        self._broker = None if broker is None else BrokerClient(at=broker)
        self._incus = incus

    async def cut_off(self, member: str) -> int:
        """Close the connections with a member's Incus at HOST:PORT; return how many.

        Raises `NotFound` and `Unavailable`.
        """
        if self._broker is not None:
            answer, _ = await self._broker.request({"do": "cut_off", "member": member})
            return int(answer["ended"])
        try:
            return await asyncio.to_thread(self._cut_off, member)
        except OSError as error:
            raise Unavailable(f"connections with a dead server cannot be cut: {error}") from error

    def _cut_off(self, member: str) -> int:
        return dead_members.cut_off(member, dead_members.members(self._incus))

    async def aclose(self) -> None:
        if self._broker is not None:
            await self._broker.aclose()
