"""Refuse an incusd that is a member of a cluster, until its sites are served from each of its members.

A request to another member's tenant, and a visitor of its site, would not find it here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any, Final

from gateway.errors import Unavailable
from gateway.incus import Incus, IncusError, member_of
from gateway.settings import Settings

REASON: Final = "clustered"
_TEXT: Final = (
    "the incusd at {socket} is a member of a cluster, which the gateway does not support; use a separate, "
    "unclustered incusd and set GATEWAY_INCUS_SOCKET to its socket"
)
_LIFTED: Final = "GATEWAY_TEST_CLUSTER"  # for tests of what there is already
_LOOK: Final = 5.0  # seconds; `/readyz` checks again if incusd does not answer yet


def clustered(server: Mapping[str, Any], settings: Settings) -> str:
    """Return why a server, as described by `/1.0`, is refused; empty if it is not."""
    refused = member_of(server) and _LIFTED not in os.environ
    return _TEXT.format(socket=settings.incus_socket) if refused else ""


async def refuse_cluster(settings: Settings) -> None:
    """Raise `Unavailable` if incusd is clustered; return if it is not or does not answer."""
    try:
        async with asyncio.timeout(_LOOK), Incus(settings.incus_socket, settings.incus_project) as incus:
            server = await incus.get("/1.0")
    except (IncusError, TimeoutError):
        return
    if why := clustered(server, settings):
        raise Unavailable(why, reason=REASON)
