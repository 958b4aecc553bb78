"""Finds out where a domain leads its visitors, and whether some are still being answered."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from gateway.caddy import Caddy
from gateway.host import HostError, run

_LED: Final = 20.0  # seconds for the gateway to follow a change in Incus; it usually takes 0.1
_LOOK: Final = 0.02
_ON_THE_WAY: Final = 0.3  # seconds for a request whose route was looked up to become a connection
_DRAIN: Final = 5.0  # seconds for the old service's visitors to get their answers
_TIMES: Final = re.compile(r"\b(lastsnd|lastrcv):(\d+)")


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


async def drained(address: str, port: int, listing: Callable[[str, int], str] | None = None) -> bool:
    """Wait until no client waits for the old service's answer; return False if some still do.

    An idle connection, such as Caddy keeps, is not waiting; an idle websocket looks the same.
    """
    listing = listing or _connections
    until, quiet_since = time.monotonic() + _DRAIN, time.monotonic()
    while (now := time.monotonic()) < until:
        if any(map(waits, await asyncio.to_thread(_told, listing, address, port))):
            quiet_since = now
        elif now - quiet_since >= _ON_THE_WAY:
            return True
        await asyncio.sleep(_LOOK)
    return False


def waits(line: str) -> bool:
    """Return whether the client has sent something since it last received, by a line of `ss -i`."""
    times = {key: int(value) for key, value in _TIMES.findall(line)}
    sent, received = times.get("lastsnd"), times.get("lastrcv")
    return sent is not None and (received is None or sent < received)


def _told(listing: Callable[[str, int], str], address: str, port: int) -> list[str]:
    return listing(address, port).splitlines()


def _connections(address: str, port: int) -> str:
    words = ["ss", "-HtinO", "state", "established", "dst", f"{address}:{port}"]
    return run(words, fix="install it: apt-get install iproute2")
