"""Make sites reachable: directly, or through a port or socket of this host that Incus forwards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections import Counter
from typing import Final

from gateway.errors import Unavailable
from gateway.incus import IncusError
from gateway.incus.client import instance_path
from gateway.runtime.incus.addresses import exposure
from gateway.runtime.incus.creation import Creation
from gateway.runtime.incus.errors import translated
from gateway.runtime.sites import Exposure, Recipe, Side
from gateway.settings import Settings

log = logging.getLogger(__name__)

DEVICES: Final[dict[Side, str]] = {"live": "site", "next": "site-next"}
"""The names of the proxy devices of an instance's two sides."""

_TRIES: Final = 20  # attempts to find a free port
_FAILURES: Final = 3  # attempts per port or socket


class Ports:
    """The ports and sockets of this host that lead to sites, as set by `GATEWAY_EXPOSE`."""

    def __init__(self, settings: Settings, making: Creation) -> None:
        self._settings, self._making = settings, making

    async def expose(self, tenant: str, side: Side, recipe: Recipe) -> Exposure:
        """Make a side reachable; return where. Raises `Unavailable` if no port is free."""
        device, port = DEVICES[side], recipe.listens(side)
        if self._settings.expose != "address":
            await self._add_proxy(tenant, device, port)
        found = exposure(await self._making.placed(tenant), port, device)
        if found is None:
            raise Unavailable(f"tenant {tenant} has no address on {self._settings.network}")
        return found

    async def _add_proxy(self, tenant: str, device: str, port: int) -> None:
        """Give a site a port or a socket of this host.

        Incus adds a device to a running instance only if it can listen: of two gateways choosing the same
        port, one fails and chooses again. And if several proxies start at once, Incus occasionally fails one
        for a transient reason.
        """
        connect = f"tcp:127.0.0.1:{port}"
        failed: Counter[int] = Counter()  # by port; 0 for the socket
        for attempt in range(_TRIES):
            proxies = {
                (instance["name"], name): entry
                for instance in await self._making.instances()
                for name, entry in instance["devices"].items()
                if entry.get("type") == "proxy"
            }
            there = proxies.get((tenant, device))
            if there is not None and there["connect"] == connect:
                return
            if self._settings.expose == "socket":
                chosen = 0
                folder = self._settings.caddy_folder.absolute() / "sockets"
                name = tenant if device == DEVICES["live"] else f"{tenant}.next"
                listen = {"listen": f"unix:{folder}/{name}.sock", "mode": "0666"}
            else:
                taken = {entry["listen"].rpartition(":")[2] for entry in proxies.values()}
                chosen = await self._free_port(taken, failed)
                listen = {"listen": f"tcp:127.0.0.1:{chosen}"}
            change = {"devices": {device: {"type": "proxy", "connect": connect, **listen}}}
            try:
                await self._making.operate("PATCH", instance_path(tenant), change)
                return
            except IncusError as error:
                # if it cannot listen, Incus repeats its child's message, or only reports that the child ended
                log.info("cannot expose tenant %s at %s: %s", tenant, listen["listen"], error.message)
                failed[chosen] += 1
                again = failed[0] < _FAILURES and attempt < _TRIES - 1
                if "proxy device" in error.message and again:
                    continue
                with translated(tenant):
                    raise

    async def _free_port(self, taken: set[str], failed: Counter[int]) -> int:
        """Return a free port for a site, preferably one that has not `failed` yet."""
        first, _, last = self._settings.expose_ports.partition("-")
        free = {number for number in range(int(first), int(last) + 1) if str(number) not in taken}
        chosen = await asyncio.to_thread(_unused, free - {*failed})
        if chosen is None:  # one that failed may be free by now
            free = {number for number in free if failed[number] < _FAILURES}
            chosen = await asyncio.to_thread(_unused, free)
        if chosen is None:
            raise Unavailable(
                f"all ports of {self._settings.expose_ports} are taken; set GATEWAY_EXPOSE_PORTS",
                reason="port_taken",
            )
        return chosen


def _unused(ports: set[int]) -> int | None:
    """Return one of these ports at random that is free on this host, or None."""
    for port in random.sample(sorted(ports), len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy does
            probe.bind(("127.0.0.1", port))
            return port
    return None
