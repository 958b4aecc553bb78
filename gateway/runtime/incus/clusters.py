"""Refuse an incusd that is a member of a cluster.

The gateway takes each tenant for one of this host: in a cluster it would route a domain to another member's
tenant with the same address, and take the tenants of a member that is down for destroyed.
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
    "the incusd at {socket} is a member of a cluster, which the gateway does not support; run the gateway "
    "with an incusd of its own, and set GATEWAY_INCUS_SOCKET to its socket"
)
_LOOK: Final = 5.0  # seconds; an incusd that does not answer yet is checked again by `/readyz`


def clustered(server: Mapping[str, Any], settings: Settings) -> str:
    """Return why a server, as `/1.0` describes it, is refused; empty if it is not."""
    in_cluster = (server.get("environment") or {}).get("server_clustered") is True
    return _TEXT.format(socket=settings.incus_socket) if in_cluster else ""


async def refuse_cluster(settings: Settings) -> None:
    """Raise `Unavailable` if incusd is in a cluster; return if it is not, or does not answer."""
    try:
        async with asyncio.timeout(_LOOK), Incus(settings.incus_socket, settings.incus_project) as incus:
            server = await incus.get("/1.0")
    except (IncusError, TimeoutError):
        return
    if why := clustered(server, settings):
        raise Unavailable(why, reason=REASON)
