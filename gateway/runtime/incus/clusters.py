"""Refuse an incusd that is a member of a cluster, until each member can serve the cluster's sites.

A request to another member's tenant, and a visitor of its site, would not find it here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from gateway.cluster.shared_keys import NO_QUORUM
from gateway.errors import Unavailable
from gateway.incus import Incus, IncusError, member_of
from gateway.runtime.incus.errors import translated
from gateway.settings import Settings

REASON: Final = "clustered"
_TEXT: Final = (
    "the incusd at {socket} is a member of a cluster, which the gateway does not support; use a separate, "
    "unclustered incusd and set GATEWAY_INCUS_SOCKET to its socket"
)
_LIFTED: Final = "GATEWAY_TEST_CLUSTER"  # for tests of what there is already
_DATABASE: Final = 1.0  # seconds for a read of a cluster's database
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


async def serving(incus: Incus, settings: Settings) -> None:
    """Raise `Unavailable` if incusd does not answer, cannot decide, or is in another cluster than before."""
    with translated(""):
        server = await incus.get("/1.0")
        before = await incus.member()
    if why := clustered(server, settings):
        raise Unavailable(why, reason=REASON)
    if (now := member_of(server)) != before:
        where = f"the member {now} of a cluster" if now else "not in a cluster"
        raise Unavailable(f"incusd is {where} now; restart the gateway", reason=REASON)
    if now:
        await _decides(incus, settings.image)


async def _decides(incus: Incus, image: str) -> None:
    """Raise `Unavailable` if a cluster's database does not answer; `/1.0` is answered without it."""
    try:
        async with asyncio.timeout(_DATABASE):
            await incus.get(f"/1.0/images/aliases/{quote(image, safe='')}")
    except (TimeoutError, IncusError) as error:
        if isinstance(error, IncusError) and error.status == 404:
            return
        raise Unavailable(
            "the cluster's database does not answer: most members are away, or its leader has just died; "
            "running sites and commands keep running",
            reason=NO_QUORUM,
        ) from error
