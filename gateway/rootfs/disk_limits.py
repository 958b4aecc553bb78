"""Limits the disks of instances, by the broker or as root."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from pathlib import Path

from gateway.errors import GatewayError
from gateway.rootfs.broker_client import BrokerClient
from gateway.rootfs.locations import Tenants

log = logging.getLogger(__name__)


class DiskLimits:
    """Limits disks through the broker at a socket or, without one, in this process as root.

    Not by the connection of the file tools: their requests would wait meanwhile.
    """

    def __init__(self, broker: Path | None, tenants: Tenants) -> None:
        self._tenants = tenants
        self._broker = None if broker is None else BrokerClient(at=broker)
        self._freeing = None if broker is None else BrokerClient(at=broker)

    async def limit(self, instance: str, *, ending: bool = False, standby: bool = False) -> int | None:
        """Limit an instance's disk as its size says; return the bytes that count.

        Call it before and after each start, before each stop as `ending`, and when the size has changed:
        while it does not run, a full disk has some slack for Incus. Of a `standby` copy each time that it has
        got something: it is only counted. Returns None for other quotas, which are Incus's affair. Raises
        `NotFound` and `Unavailable`.
        """
        if self._broker is not None:
            return await self._broker.limit_disk(instance, ending=ending, standby=standby)
        if os.geteuid() != 0:
            return None
        limit = partial(self._tenants.limit_disk, instance, ending=ending, standby=standby)
        return await asyncio.to_thread(limit)

    async def free(self) -> None:
        """Stop counting what was deleted; after some seconds or a failure, leave it to the kernel."""
        try:
            if self._freeing is not None:
                await self._freeing.free_disks()
            elif os.geteuid() == 0:
                await asyncio.to_thread(self._tenants.free_disks)
        except (GatewayError, OSError) as error:
            log.warning("deleted data counts for up to half a minute more: %s", error)

    async def aclose(self) -> None:
        for broker in (self._broker, self._freeing):
            if broker is not None:
                await broker.aclose()
