"""Finds out where a domain leads its visitors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

import orjson

from gateway.caddy import Caddy
from gateway.host import HostError

_LED: Final = 20.0  # seconds for the gateway to follow a change in Incus; it usually takes 0.1
_LOOK: Final = 0.02


async def led(caddy: Caddy, domain: str, target: str | None) -> None:
    """Wait until the gateway routes a domain there, or nowhere. Raises `HostError`."""
    until = time.monotonic() + _LED
    while caddy.get(domain) != target:
        if time.monotonic() > until:
            raise HostError(
                f"the gateway has not routed {domain} to {target}: it must be running, and the domain must "
                "be this tenant's (incus-gateway doctor says what is wrong); then run the command again"
            )
        await asyncio.sleep(_LOOK)  # another process does it and notifies nobody


def own_block(running: Mapping[str, Any] | None, domain: str, ours: str) -> bool:
    """Return whether a Caddy's configuration has a block for a domain that precedes the gateway's routes.

    `ours` is the folder of the gateway's routes, which is named in its own blocks.
    """
    servers = ((running or {}).get("apps") or {}).get("http", {}).get("servers", {})
    names = {domain, f"*.{domain.partition('.')[2]}"}
    for server in servers.values():
        for route in server.get("routes") or ():
            hosts = {host for match in route.get("match") or () for host in match.get("host") or ()}
            if hosts & names and ours not in orjson.dumps(route).decode():
                return True
    return False
