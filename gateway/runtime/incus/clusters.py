"""Refuse an incusd that is a member of a cluster.

The gateway assumes that each tenant is on this host: in a cluster it would route a domain to another member's
tenant with the same address, and treat the tenants of a member that is down as destroyed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from gateway.errors import Unavailable
from gateway.incus import Incus, IncusError
from gateway.settings import Settings

REASON: Final = "clustered"
_TEXT: Final = (
    "the incusd at {socket} is a member of a cluster, which the gateway does not support; use a separate, "
    "unclustered incusd and set GATEWAY_INCUS_SOCKET to its socket"
)
_LOOK: Final = 5.0  # seconds; `/readyz` checks again if incusd does not answer yet


def clustered(server: Mapping[str, Any], settings: Settings) -> str:
    """Return why a server, as described by `/1.0`, is refused; empty if it is not."""
    in_cluster = (server.get("environment") or {}).get("server_clustered") is True
    return _TEXT.format(socket=settings.incus_socket) if in_cluster else ""


async def refuse_cluster(settings: Settings) -> None:
    """Raise `Unavailable` if incusd is clustered; return if it is not or does not answer."""
    try:
        async with asyncio.timeout(_LOOK), Incus(settings.incus_socket, settings.incus_project) as incus:
            server = await incus.get("/1.0")
    except (IncusError, TimeoutError):
        return
    if why := clustered(server, settings):
        raise Unavailable(why, reason=REASON)
