"""Whether incusd serves: it answers, can decide, and is the member that it was when the gateway started."""

from __future__ import annotations

import asyncio
from typing import Final
from urllib.parse import quote

from gateway.errors import Unavailable
from gateway.incus import Incus, IncusError, member_of
from gateway.incus.members import NO_QUORUM
from gateway.runtime.incus.errors import translated
from gateway.settings import Settings

REASON: Final = "clustered"
_DATABASE: Final = 1.0  # seconds for a read of a cluster's database


async def serving(incus: Incus, settings: Settings) -> None:
    """Raise `Unavailable` if incusd does not answer, cannot decide, or is in another cluster than before."""
    with translated(""):
        server = await incus.get("/1.0")
        before = await incus.member()
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
